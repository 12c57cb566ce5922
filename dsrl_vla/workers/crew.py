"""A collector whose decisions are made elsewhere, while the learner learns.

The schedule is fixed. `Crew.step` takes the harvest of the oldest round, enters it worker by worker, and orders the
round that is `ahead` of it, with the head as it then is. So what a run does depends on its seed and on nothing else,
and a worker that died is replaced by one that does the same again: what it had reached came with its last harvest.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..collecting import AnyCollector
from ..errors import WorkerLostError
from ..faults import Faults
from ..head import SteeringHead
from ..replay import Replay
from ..watch import Finished
from .config import RolloutConfig
from .links import LINKS, Link
from .parcels import Inbox, arrays, from_bytes, pack, tensors, to_bytes, unpack
from .worker import WorkerSpec

log = logging.getLogger(__name__)


class Crew(AnyCollector):
    """Workers that collect in rounds, and their orders.

    Owns the order of training episodes, and hands the replay what the workers observed. The learner owns replay and
    head; a worker is sent a copy of the head's weights with every order, and nothing else.
    """

    def __init__(
        self, head: SteeringHead, replay: Replay, spec: WorkerSpec, config: RolloutConfig, faults: Faults | None = None
    ):
        super().__init__(config.workers * spec.task.num_envs, faults)
        self.head, self.spec, self.config = head, spec, config
        self.inboxes = [Inbox(replay) for _ in range(config.workers)]
        self.pasts = [b""] * config.workers
        """Where each worker was when its last harvest was entered; empty before its first."""
        self.orders: deque[bytes] = deque()
        """Given to all workers, and not yet harvested; the oldest first."""
        self.links: list[Link] = []
        self.restarts = 0

    def step(self, warm_up: bool) -> None:
        """Enter the oldest round's harvest, and order one as far ahead as the recipe says.

        `warm_up` holds for the round that is ordered: warming up lasts `ahead` rounds longer than it does inline.

        Raises:
            WorkerLostError: more workers have died than `max_restarts`; what was entered before is whole.
            TooManyFaultsError: as `Collector.step`. Whatever base and environments raise.
        """
        order = pack({"warm_up": warm_up, "head": arrays(self.head.state_dict())})
        if not self.links:
            self.links = [self._hire(number) for number in range(self.config.workers)]
        self._order(order, max(1, self.config.ahead))
        self.whole = True
        harvests = [self._harvest(number) for number in range(self.config.workers)]
        self.whole = False
        self.orders.popleft()
        for number, harvest in enumerate(harvests):
            self._enter(number, unpack(harvest))
        self._order(order, self.config.ahead)

    def _hire(self, number: int) -> Link:
        """A worker that goes on where this number's was, with the orders it has not carried out."""
        link = LINKS[self.config.backend](self.spec, number, self.pasts[number])
        for order in self.orders:
            link.post(order)
        return link

    def _order(self, order: bytes, until: int) -> None:
        """Give an order again and again until so many are not harvested yet."""
        while len(self.orders) < until:
            self.orders.append(order)
            for link in self.links:
                link.post(order)

    def _harvest(self, number: int) -> bytes:
        """A worker's oldest harvest, from its replacement if need be."""
        while True:
            try:
                return self.links[number].take()
            except WorkerLostError as error:
                self._replace(number, error)

    def _replace(self, number: int, error: WorkerLostError) -> None:
        self.links[number].close()
        if self.restarts >= self.config.max_restarts:
            raise WorkerLostError(
                f"rollout worker {number}: expected it to live, got its death ({error}), and rollout.max_restarts "
                f"{self.config.max_restarts} before it. The state is saved: mend the cause and go on with --resume."
            ) from error
        self.restarts += 1
        log.warning(
            "rollout worker %d died (%s); restart %d of %d: another takes its place, and plays the episodes under way "
            "up to where they were.", number, error, self.restarts, self.config.max_restarts,
        )  # fmt: skip
        self.links[number] = self._hire(number)

    def _enter(self, number: int, harvest: dict[str, Any]) -> None:
        """Book what a worker brings."""
        inbox = self.inboxes[number]
        inbox.play(harvest["writes"])
        for name, count in harvest["counts"].items():
            setattr(self, name, getattr(self, name) + count)
        self.recent.extend(harvest["recent"])
        for held in harvest["finished"]:
            self.finished.append(Finished.from_tensors(tensors(held | {"numbers": inbox.translate(held["numbers"])})))
        self.pasts[number] = harvest["past"]
        for kind, words in harvest["faults"]:
            self.faults.add(kind, words)

    def tensors(self) -> dict[str, torch.Tensor]:
        """With `state`, all that is needed to go on with the very next round: orders and pasts are bytes."""
        found = self._past_tensors()
        for number, (inbox, past) in enumerate(zip(self.inboxes, self.pasts, strict=True)):
            found[f"worker.{number}.numbers"] = torch.tensor(np.array(inbox.numbers, dtype=np.int64))
            found[f"worker.{number}.past"] = from_bytes(past)
        return found | {f"order.{i}": from_bytes(order) for i, order in enumerate(self.orders)}

    def state(self) -> dict[str, Any]:
        """Counters; JSON-able."""
        return self._past_state() | {"orders": len(self.orders), "restarts": self.restarts}

    def resume(self, held: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Undo `tensors` and `state`; as `Collector.resume`, worker by worker, when the first order is given."""
        self._resume_past(held, state)
        self.restarts = state["restarts"]
        for number, inbox in enumerate(self.inboxes):
            inbox.numbers.extend(held[f"worker.{number}.numbers"].tolist())
            self.pasts[number] = to_bytes(held[f"worker.{number}.past"])
        self.orders.extend(to_bytes(held[f"order.{i}"]) for i in range(state["orders"]))

    def close(self) -> None:
        """End the workers. Rounds that were ordered ahead are lost, and count for nothing."""
        links, self.links = self.links, []
        with ThreadPoolExecutor(max(1, len(links))) as together:  # each may take as long as its round does
            ended = [together.submit(link.close) for link in links]
        for each in ended:
            each.result()
