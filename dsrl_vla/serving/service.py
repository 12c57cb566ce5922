"""What a server does for its clients, without the network: decisions, encodings kept under handles, counts.

Runs in one thread. Owns the base; each connection owns its `Session`.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..errors import DsrlError, bad
from ..failsafe import FailSafe, Guard, finite
from ..head import SteeringHead
from ..noise import generators
from ..observation import IMAGE_PREFIX, PROMPT, Observations, ObservationSpec
from ..policy import Encoding, FrozenPolicy
from ..steered_policy import NOT_FINITE, SteeredPolicy
from . import protocol as p
from .requests import Denoise, Encode, Feature, Infer, Request, Sha256, Status

Reply = dict[str, Any]


class GoneError(DsrlError):
    """A handle whose encoding is no longer kept."""


class Handles:
    """The encodings of one connection: the newest few, by number."""

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[int, Encoding] = OrderedDict()
        self._next = secrets.randbits(48)
        """A number of another connection, or of another server, is not taken for one of these."""

    def keep(self, encoding: Encoding) -> int:
        """Keep one, and let go of the least recently used beyond the limit."""
        self._next += 1
        self._kept[self._next] = encoding
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)
        return self._next

    def get(self, handle: int) -> Encoding:
        """Raises GoneError when it is no longer there."""
        if handle not in self._kept:
            raise GoneError(f"{p.HANDLE}: expected one of the newest {self.limit}, got {handle}. Encode again.")
        self._kept.move_to_end(handle)
        return self._kept[handle]

    def release(self, handles: Sequence[int]) -> None:
        """Let go of these."""
        for handle in handles:
            self._kept.pop(handle, None)

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class Session:
    """What belongs to one connection. One robot's broken sensor switches the head off for that robot alone, and until
    it connects again."""

    handles: Handles
    guard: Guard | None = None
    """Over the head's noise; None without a head."""


@dataclass
class _Noise:
    """Of one request: float32 (1, K, H, D), and where it came from."""

    values: torch.Tensor
    source: str
    fallback: str = ""
    asked: list[str] = field(default_factory=list)
    """What the guard said of each sample that the head was asked for."""


class Service:
    """A base, with or without a head.

    Args:
        deterministic: the head's mode by default, not a sample; a request may ask otherwise.

    Raises:
        DsrlError: the head does not fit the base.
    """

    def __init__(self, base: FrozenPolicy, head: SteeringHead | None = None, *, deterministic: bool = True):
        self.base, self.deterministic = base, deterministic
        self.policy = SteeredPolicy(base, head) if head else None
        self.counts: Counter[str] = Counter()
        """prefix_passes, observations (rows in them), sampler_runs; decisions by where their noise came from:
        noise.head, noise.prior, noise.request, and of the priors those where the head fell back."""
        self.sha256 = base.sha256()
        self.fingerprint = base.fingerprint()

    @property
    def seen(self) -> ObservationSpec:
        """What an observation to act on must hold: what the base sees, in its order, and the head's own cameras."""
        own = self.policy.head.config.cameras if self.policy else ()
        spec = self.base.spec.observation
        return replace(spec, cameras={**spec.cameras, **{k: None for k in own if k not in spec.cameras}})

    def metadata(self) -> dict[str, Any]:
        """What the server opens with."""
        layout = self.policy.head.layout if self.policy else None
        about = {"name": layout.name, "bound": layout.bound, "columns": layout.columns} if layout else None
        mark = asdict(self.fingerprint) if self.fingerprint else None
        return p.metadata(self.base.spec, handles=True, sha256=self.sha256, fingerprint=mark, layout=about)

    def warm_up(self, sizes: Sequence[int] = (1,)) -> None:
        """Run every path at these batch sizes, so that no client waits for compilation."""
        request = Infer(self.seen.blank(), None, seed=0, wants=frozenset({"feature", "noise"}))
        made_up = FailSafe(max_z=math.inf)  # nothing is foreign
        session = Session(Handles(1), Guard(self.policy.head, self.base.spec.noise, made_up) if self.policy else None)
        for one in [*([request] * size for size in sizes), [replace(request, steer=False)]]:
            for reply in self.infer(one, [session] * len(one)):
                if isinstance(reply, DsrlError):
                    raise reply
        self.counts.clear()

    def session(self, limit: int) -> Session:
        """What a new connection owns; up to `limit` encodings."""
        return Session(Handles(limit), self.policy.guard.another() if self.policy else None)

    def run(self, request: Request, session: Session) -> Reply:
        """Carry out one request. Raises DsrlError for what the client can mend, anything else for what it cannot."""
        if isinstance(request, Infer):
            reply = self.infer([request], [session])[0]
            if isinstance(reply, DsrlError):
                raise reply
            return reply
        if isinstance(request, Encode):
            encoding = self._encode(request.observations)
            return {p.HANDLE: session.handles.keep(encoding), p.FEATURE: _numpy(encoding.feature)}
        if isinstance(request, Denoise):
            actions = self._sample(session.handles.get(request.handle), request.noise)  # finite or not, as in process
            return {p.ACTIONS: actions.numpy(), p.SOURCE: "request"}
        if isinstance(request, Feature):
            if not self.base.spec.feature_dim:
                raise bad("get_prefix_rep", "a base that offers a feature", f"the black box '{self.base.spec.uri}'")
            return {p.FEATURE: _numpy(self._encode(request.observations).feature)}
        if isinstance(request, Sha256):
            return {"dsrl/sha256": self.base.sha256()}
        assert isinstance(request, Status)
        return {"dsrl/status": dict(self.counts)}

    def infer(self, requests: Sequence[Infer], sessions: Sequence[Session]) -> list[Reply | DsrlError]:
        """Decisions for several clients behind one prefix pass; all of one `batch_key`. One whose actions are not
        finite gets its refusal in the place of a reply."""
        observations = _join([request.observations for request in requests])
        encoding = self._encode(observations)
        noises = [self._noise(*each, _row(encoding, i)) for i, each in enumerate(zip(requests, sessions, strict=True))]
        actions = self._actions(requests, sessions, noises, encoding)
        rows = enumerate(zip(requests, noises, actions, strict=True))
        return [self._reply(*each, encoding, i) for i, each in rows]

    def _actions(
        self, requests: Sequence[Infer], sessions: Sequence[Session], noises: list[_Noise], encoding: Encoding
    ) -> torch.Tensor:
        """The actions (B, K, H, A) under these noises; where a head's leads to none that are finite, the base's own,
        as which it is then booked."""
        actions = self._sample(encoding, torch.cat([noise.values for noise in noises]))
        broken = ~finite(actions)
        turned = [i for i, noise in enumerate(noises) if broken[i] and noise.asked]
        for i in turned:
            asked = [why or NOT_FINITE for why in noises[i].asked]
            noises[i] = _Noise(self._prior(requests[i]), "prior", NOT_FINITE, asked)
        if turned:
            actions = self._sample(encoding, torch.cat([noise.values for noise in noises]))
        for session, noise in zip(sessions, noises, strict=True):
            if session.guard is not None:
                session.guard.book(noise.asked)
        return actions

    def _prior(self, request: Infer) -> torch.Tensor:
        return self.base.spec.noise.sample(generators([request.seed]), request.samples)

    def _noise(self, request: Infer, session: Session, encoding: Encoding) -> _Noise:
        if request.noise is not None:
            return _Noise(request.noise, "request")
        if self.policy is None or session.guard is None or not (request.steer and self.policy.enabled):
            return _Noise(self._prior(request), "prior")
        deterministic = self.deterministic and request.deterministic and request.samples == 1
        drawn = [
            session.guard.noise(request.observations, encoding, [request.seed + k], deterministic)
            for k in range(request.samples)
        ]
        values, asked = torch.cat([noise for noise, _ in drawn], 1), [why for _, (why,) in drawn]
        if any(asked):
            fallen = torch.tensor([bool(why) for why in asked]).view(1, -1, 1, 1)
            values = torch.where(fallen, self._prior(request), values)
        return _Noise(values, "prior" if all(asked) else "head", next(filter(None, asked), ""), asked)

    def _reply(
        self, request: Infer, noise: _Noise, actions: torch.Tensor, encoding: Encoding, row: int
    ) -> Reply | DsrlError:
        try:
            _checked(actions)
        except DsrlError as refusal:
            return refusal
        self.counts[f"noise.{noise.source}"] += 1
        self.counts["fallbacks"] += bool(noise.fallback)
        reply: Reply = {
            p.ACTIONS: actions.numpy() if request.many else actions[0].numpy(),
            p.SOURCE: noise.source,
            p.SEED: request.seed,
        }
        if noise.fallback:
            reply[p.FALLBACK] = noise.fallback
        if "feature" in request.wants:
            reply[p.FEATURE] = None if encoding.feature is None else _numpy(encoding.feature[row])
        if "noise" in request.wants:
            reply[p.NOISE] = noise.values[0].numpy()
        return reply

    def _encode(self, observations: Observations) -> Encoding:
        encoding = self.base.encode(observations)
        self.counts["prefix_passes"] += 1
        self.counts["observations"] += encoding.batch
        return encoding

    def _sample(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        self.counts["sampler_runs"] += 1
        return self.base.denoise(encoding, noise)


def _checked(actions: torch.Tensor) -> torch.Tensor:
    """Refuses actions that are not finite: no robot is to get them."""
    if not torch.isfinite(actions).all():
        raise bad("actions", "finite values out of this observation and noise", "NaN or infinity")
    return actions


def batch_key(request: Request) -> Any:
    """Requests of equal key can share a prefix pass; None: this one goes alone."""
    if not isinstance(request, Infer):
        return None
    shapes = {k: np.shape(v) for k, v in request.observations.items() if k.startswith(IMAGE_PREFIX)}
    return request.samples, tuple(sorted(shapes.items())), frozenset(request.observations)


def _join(batches: Sequence[Observations]) -> Observations:
    if len(batches) == 1:
        return batches[0]
    joined: Observations = {key: np.concatenate([b[key] for b in batches]) for key in batches[0] if key != PROMPT}
    if PROMPT in batches[0]:
        joined[PROMPT] = [prompt for b in batches for prompt in b[PROMPT]]
    return joined


def _row(encoding: Encoding, row: int) -> Encoding:
    """One row of an encoding, for a head, which looks at the feature alone."""
    feature = encoding.feature
    return Encoding(1, None if feature is None else feature[row : row + 1], None)


def _numpy(feature: torch.Tensor | None) -> np.ndarray | None:
    return None if feature is None else feature.float().cpu().numpy()
