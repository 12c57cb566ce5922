"""What the benchmarks share: measuring side by side, and saying how far from the goal."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's model where Linux tells it, else its architecture: ratios too differ between models."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(frozen=True)
class Goal:
    """A figure, what it should be, and whether it is."""

    what: str
    value: float
    goal: float
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        sign, verdict = "at least" if self.at_least else "at most", "met" if self.met else "MISSED"
        return f"{self.what}: {self.value:g}{self.unit} (goal: {sign} {self.goal:g}{self.unit}): {verdict}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def side_by_side(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[str, np.ndarray]:
    """Seconds per call of each, (rounds,); the functions take turns, so that all share what else the machine does.

    The clock is the process's CPU time unless told otherwise: on one thread it is the time without the waiting.
    """
    clock = clock or time.process_time
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            start = clock()
            for _ in range(repeats):
                function()
            if number:
                times[name].append((clock() - start) / repeats)
    return {name: np.array(values) for name, values in times.items()}


def on_the_gpu(functions: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of wall-clock time per call of each, the GPU's work included."""
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return side_by_side(functions, rounds, repeats, clock)


def interval(values: np.ndarray) -> dict[str, Any]:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (5000, len(values)))
    low, high = np.quantile(np.median(values[draws], 1), (0.025, 0.975))
    digits = lambda x: float(f"{x:.4g}")
    return {"median": digits(np.median(values)), "ci95": [digits(low), digits(high)]}


def finish(name: str, goals: list[Goal], **found: Any) -> int:
    """Write ``results/<name>.json``, print each goal, return the exit status: 0 when all are met."""
    import torch

    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"machine": machine, **found, "goals": [goal.to_json() for goal in goals]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for goal in goals:
        print(goal)
    return int(not all(goal.met for goal in goals))
