"""Ten thousand decisions of a steered policy: does memory stay flat, and are the slow ones few?

    python benchmarks/soak.py [--decisions 10000] [--base nano:]

The shipped drawer-open head on the embedded base, on seeded random observations; every hundredth decision has a head
that raises or answers NaN, so that falling back is soaked too. A decision is timed by
the wall clock and by the process's own CPU time: the first is what a robot waits, but on a machine that others use it
measures them as well. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro


@dataclass(frozen=True)
class Args:
    """What to run."""

    decisions: int = 10_000
    base: str = "nano:"
    head: str = "shipped:drawer-open"
    warm_up: int = 200
    """Decisions before the first that counts."""
    out: Path = field(default=Path(__file__).parent / "results" / "soak.json")


def resident_kib() -> int:
    """The process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def observations(base: Any, count: int) -> list[dict[str, Any]]:
    """Random observations that the base takes."""
    rng, spec = np.random.default_rng(0), base.spec.observation
    made = []
    for _ in range(count):
        one: dict[str, Any] = {"observation.state": rng.normal(0, 0.3, spec.state_dim).astype(np.float32)}
        for name in spec.cameras:
            one[f"observation.images.{name}"] = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        made.append(one | {"task": "open a drawer"})
    return made


def faulty(policy: Any, number: int, observation: dict[str, Any]) -> Any:
    """A decision that has to fall back: the head raises, or answers NaN."""
    import torch

    real = policy.head.latent
    nan = torch.full((1, *policy.head.layout.latent_shape), np.nan)
    policy.head.latent = (lambda *_: nan) if number % 200 == 99 else (lambda *_: 1 / 0)
    try:
        return policy.act(observation, seed=number)
    finally:
        policy.head.latent = real


def main(args: Args) -> None:
    """Run, measure, write."""
    import torch
    from dsrl_vla import SteeredPolicy, SteeringHead, load_base
    from dsrl_vla.failsafe import FailSafe

    torch.set_num_threads(1)
    logging.getLogger("dsrl_vla").setLevel(logging.CRITICAL)
    base = load_base(args.base)
    # Random pictures are far from all training: here that is not what is measured.
    policy = SteeredPolicy(base, SteeringHead.from_pretrained(args.head), failsafe=FailSafe(max_z=float("inf")))
    seen = observations(base, 64)
    wall, cpu, memory = [], [], []
    for number in range(-args.warm_up, args.decisions):
        act = faulty if number % 100 == 99 else lambda p, n, o: p.act(o, seed=n)
        start, used = time.perf_counter(), time.process_time()
        act(policy, number, seen[number % len(seen)])
        if number < 0:
            continue
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if number % 100 == 0:
            memory.append((number, resident_kib()))
    decisions, kib = np.array(memory, dtype=float).T
    second = decisions >= args.decisions / 2
    result: dict[str, Any] = {"base": args.base, "head": args.head, "decisions": args.decisions}
    result["cpus"], result["load"] = os.cpu_count(), round(os.getloadavg()[0], 2)
    for name, seconds in (("wall", wall), ("cpu", cpu)):
        p50, p99 = (float(np.quantile(seconds, q)) * 1000 for q in (0.5, 0.99))
        result[f"{name}_ms"] = {"p50": round(p50, 2), "p99": round(p99, 2), "ratio": round(p99 / p50, 2)}
    result["memory"] = {
        "first_mib": round(kib[0] / 1024, 1),
        "last_mib": round(kib[-1] / 1024, 1),
        "bytes_per_decision": round(float(np.polyfit(decisions, kib, 1)[0]) * 1024, 1),
        "bytes_per_decision_second_half": round(float(np.polyfit(decisions[second], kib[second], 1)[0]) * 1024, 1),
    }
    result["fallbacks"], result["latched"] = policy.fallbacks, not policy.steering
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
