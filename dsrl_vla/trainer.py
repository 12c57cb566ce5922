"""The training loop's state: collect, update, validate, keep the best head, checkpoint."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import seeds as seed_ranges
from .collectors import make_collector
from .episodes import Episode
from .errors import DsrlError, WorkerLostError, bad
from .evaluation import measure
from .faults import TrainingFaults
from .finalists import Finalist, Finalists
from .head import HeadConfig, SteeringHead
from .interrupts import stop_requests
from .inversion import check_layout
from .learners import build_learner
from .measures import YARDSTICKS
from .mixed_replay import MixedReplay
from .noise_search import SearchConfig, Ticket, search_ticket
from .offline import OfflineLoader
from .offline_sources import fill
from .policy import FrozenPolicy
from .recipe import Recipe
from .replay import Replay
from .resuming import pack
from .rollout import VectorTask
from .run_dir import Metrics, save_checkpoint
from .sources import HeadNoise
from .team import Team
from .tracking import Tracker
from .updates import Updates
from .watch import Watch, value_gap
from .writing import Writing

log = logging.getLogger(__name__)
_OFFLINE_EVERY = 1000  # updates


def _new_head(recipe: Recipe, base: FrozenPolicy) -> SteeringHead:
    section = recipe.head
    config = HeadConfig.for_base(
        base.spec,
        recipe.noise.over(base.spec.noise),
        section.network,
        cameras=section.cameras,
        image_size=section.image_size,
        fingerprint=base.fingerprint(),
    )
    return SteeringHead(config)


class Trainer:
    """Owns everything that changes during a run."""

    def __init__(
        self,
        recipe: Recipe,
        base: FrozenPolicy,
        task: VectorTask,
        held_out: VectorTask,
        out: Path,
        team: Team | None = None,
    ):
        self.recipe, self.base, self.held_out, self.out = recipe, base, held_out, out
        config, sac = recipe.train, recipe.sac
        torch.manual_seed(config.seed)
        self.head = _new_head(recipe, base)
        layout = self.head.layout
        if sac.imitate:
            check_layout(layout)
        self.searched = self._warm_start() if config.warm_start == "ticket" else 0
        """Environment steps of the search for a ticket, which count."""
        lows, highs = zip(*(info.reward_range for info in task.infos), strict=True)
        rewards = min(lows), max(highs)
        bounds = sac.value_bounds(rewards, base.spec.executed_steps)
        self.learner = build_learner(
            recipe.algorithm, base, self.head, recipe.critic, sac, recipe.na, bounds, config.seed, config.device
        )
        place = lambda name: out / name if config.replay_on_disk else None
        self.replay = Replay(config.replay_capacity, layout.latent_shape, place("replay"))
        self.data: Replay | MixedReplay = self.replay
        if recipe.offline.source:
            offline = Replay(config.replay_capacity, layout.latent_shape, place("replay-offline"))
            loader = OfflineLoader(base, self.head, self.learner.keeper(), sac, recipe.offline, rewards)
            fill(offline, loader)
            self.data = MixedReplay(self.replay, offline, recipe.offline.share, loader.actions.hexdigest())
        self.faults = TrainingFaults(config.max_faults)
        self.updates = Updates(self.learner, self.data, sac.batch, config.seed, self.faults, team or Team())
        keeper = self.learner.keeper()
        self.collector = make_collector(
            recipe, base, self.head, task, self.replay, out, keeper=keeper, faults=self.faults
        )
        self.collector.env_steps = self.searched
        self.metrics = Metrics(out / "metrics.jsonl")
        self.base_sha256 = base.sha256()
        self.measured = task.info.measure
        self.writing = Writing()
        self.finalists = Finalists(out, config.finalists, self.writing)
        self.validated: deque[float] = deque(maxlen=2)
        self.validation_env_steps = 0
        self.seconds = 0.0
        played, yardstick = config.validation_episodes * len(recipe.task.uris), YARDSTICKS[self.measured]
        self.watch = Watch(sac.target_entropy, played, config.env_steps, yardstick)
        self.owed = False
        """Whether a validation was due and has not been finished."""

    def _warm_start(self) -> int:
        """Let the head start at the best constant noise; return the environment steps that finding it took."""
        ticket, budget = self.ticket(), self.recipe.train.env_steps
        if ticket.env_steps >= budget:
            least = f"more than the {ticket.env_steps} that train.warm_start's search took"
            raise bad("train.env_steps", least, budget)
        self.head.start_at(torch.tensor(ticket.latent))
        return ticket.env_steps

    def ticket(self) -> Ticket:
        """The best constant noise of this run's layout; searched once."""
        path, config = self.out / "ticket.json", SearchConfig(seed=self.recipe.train.seed)
        if not path.exists():
            total = config.total_episodes * len(self.recipe.task.uris)
            with tqdm(total=total, unit="episode", desc="search", disable=None) as bar:
                tick = lambda _: bar.update()
                search_ticket(self.base, self.held_out, self.head.layout, config, tick).save(path)
        return Ticket.load(path)

    def run(self) -> bool:
        """Train until the recipe's steps are done; False when interrupted by Ctrl-C (the state is saved)."""
        config, collector = self.recipe.train, self.collector
        bar = tqdm(
            total=config.env_steps, initial=collector.env_steps, unit="step", desc=self.recipe.name, disable=None
        )
        with Tracker(self.recipe, self.out) as tracker, self.updates.team, stop_requests(collector.live) as asked, bar:
            try:
                if collector.live and not collector.episodes:  # its journal does not say which base it is of
                    self.checkpoint()
                self._learn_offline(asked)
                if self.owed and not asked.is_set():
                    tracker.log(self.report(self.validate()), collector.env_steps)
                    self.checkpoint()
                while not self.done and not asked.is_set():
                    before, updates, start = collector.env_steps, self.learner.updates, time.perf_counter()
                    self._decide()
                    rate = (self.learner.updates - updates) / (time.perf_counter() - start)
                    self._after(before, tracker)
                    self.seconds += time.perf_counter() - start
                    bar.update(collector.env_steps - before)
                    best = f"{self.finalists.best:.{self.watch.yardstick.digits(self.finalists.best)}f}"
                    shown = {"success": f"{collector.success:.2f}", "best": best, "updates/s": f"{rate:.0f}"}
                    bar.set_postfix(shown, refresh=False)
            except (KeyboardInterrupt, WorkerLostError) as error:
                asked.set()
                self.held_out.stop()  # a robot, before anything else
                if collector.whole:
                    self.checkpoint()
                else:  # in the middle of a decision, which is not to be saved, by nobody
                    self.writing.lost.pop("checkpoint", None)
                if isinstance(error, WorkerLostError):
                    raise
            else:
                if not self.done:
                    self.checkpoint()
        if not self.done:
            recipe = self.out / "recipe.yaml"
            log.warning("interrupted; go on with: dsrl-vla train %s --out %s --resume", recipe, self.out)
        return self.done

    def _decide(self) -> None:
        """One decision in every environment (a live task: one episode), and the updates it is owed."""
        warm_up = self.collector.decisions < self.recipe.train.learning_starts
        self.collector.step(warm_up)
        if not warm_up:
            self.catch_up()

    def catch_up(self) -> None:
        """The updates that the decisions so far are owed."""
        config = self.recipe.train
        owed = int((self.collector.decisions - config.learning_starts) * config.gradient_steps)
        if owed > 0 and len(self.data):  # the first returns over n decisions are complete after n
            self.updates.until(self.recipe.offline.updates + owed)

    def _learn_offline(self, asked: threading.Event) -> None:
        """The updates that come before the first environment step, after which a validation is owed."""
        total, done = self.recipe.offline.updates, self.learner.updates
        if not isinstance(self.data, MixedReplay) or done >= total:
            return
        with tqdm(total=total, initial=done, unit="update", desc="offline", disable=None) as bar:
            for count in range(done + 1, total + 1):
                self.owed, start = count == total, time.perf_counter()
                self.updates.until(count)
                self.seconds += time.perf_counter() - start
                bar.update()
                if asked.is_set():
                    return
                if count % _OFFLINE_EVERY == 0 and count < total:
                    self.checkpoint()

    def _after(self, before: int, tracker: Tracker) -> None:
        """Reports, validation and checkpoints that fell due since `before` environment steps."""
        config, steps = self.recipe.train, self.collector.env_steps
        begun = config.warm_start != "none" and not self.validated  # what is handed out is no worse than that
        found = self.validate() if self.learner.updates and (begun or self.due(config.validate_every, before)) else {}
        if found or self.due(1000, before):
            tracker.log(self.report(found), steps)
        if self.due(config.checkpoint_every, before):
            self.checkpoint()

    def due(self, every: int, before: int) -> bool:
        """Whether what is done every so many environment steps fell due since `before` of them."""
        return self.done or self.collector.env_steps // every > before // every

    @property
    def done(self) -> bool:
        """Whether offline updates and steps are used up, or the head has been good enough twice in a row; and what was
        due has been validated."""
        config = self.recipe.train
        good = config.stop_at is not None and len(self.validated) == 2 and min(self.validated) >= config.stop_at
        offline = self.learner.updates >= self.recipe.offline.updates
        return not self.owed and (good or (offline and self.collector.env_steps >= config.env_steps))

    def report(self, more: dict[str, float]) -> dict[str, float]:
        """Append a line to ``metrics.jsonl``; return it."""
        row: dict[str, Any] = {
            "env_steps": self.collector.env_steps,
            "episodes": self.collector.episodes,
            "decisions": self.collector.decisions,
            "updates": self.learner.updates,
            "seconds": round(self.seconds, 2),
        }
        if self.measured == "success" and not math.isnan(self.collector.success):
            row["success"] = self.collector.success
        row |= {name: round(float(value), 5) for name, value in self.updates.info.items()} | more
        if self.learner.updates:
            row |= value_gap(self.learner.critic, self.replay, self.collector.finished, self.learner.bounds)
        warnings = self.watch.see(row)
        for warning in warnings:
            log.warning("%s", warning)
        self.metrics.append(row | ({"warnings": warnings} if warnings else {}))
        return row

    def validate(self) -> dict[str, float]:
        """Run the averaged, deterministic head on the validation episodes; save it when it is one of the best."""
        head, config, self.owed = self.learner.average, self.recipe.train, True
        found = Finalist(self.collector.env_steps, *self.play(head, 0, config.validation_episodes))
        self.owed = False
        self.validated.append(found.mean)
        if self.finalists.takes(found):
            head.calibrate(self.replay.observations() or self.data.observations())
            kept = copy.deepcopy(head).cpu().eval()
            self.finalists.add(found, kept, self.learner.snapshot(kept))
            if self.collector.live:  # what a simulator does again, a robot does not
                self.checkpoint()
        return {f"validation_{self.measured}": found.mean, "validation_steps": found.steps}

    def play(
        self, head: SteeringHead, first: int, episodes: int, tick: Callable[[Episode], None] = lambda _: None
    ) -> tuple[float, float, int]:
        """What counts, the steps of an episode, and how many there were: validation's from number `first` on."""
        seeds = seed_ranges.block(seed_ranges.VALIDATION + first, episodes)
        found = measure(self.base, self.held_out, HeadNoise(head), seeds, on_episode=tick, faults=self.faults)
        self.validation_env_steps += sum(e.steps for e in found.episodes)
        return found.mean, float(np.mean([e.steps for e in found.episodes])), len(found.episodes)

    def best_head(self) -> SteeringHead:
        """The best head so far; the present one when none has been validated."""
        return self.finalists.best_head() or self.learner.average.eval()

    def checkpoint(self) -> None:
        """Write all that is needed to go on, unless it is not sound. A disk that is full does not end the run."""
        self.updates.look(closely=True)
        self.writing.attempt("checkpoint", self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        tensors, state = pack(self)
        save_checkpoint(self.out / "checkpoints", state["env_steps"], tensors, state)

    def check_saved(self) -> None:
        """Try once more to write what could not be written.

        Raises:
            DsrlError: it still cannot be.
        """
        lost = self.writing.again()
        self.metrics.flush()
        if lost or self.metrics.pending:
            words = "; ".join(lost.values())
            missing = " and no ".join(lost or ["metrics.jsonl"])
            raise DsrlError(f"{self.out}: expected all of the run to be written, got no {missing}. {words}")
