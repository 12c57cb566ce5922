"""Results as tables on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .measures import shown, shown_gain, yardstick

if TYPE_CHECKING:
    from .reachability import Reachability


def _row(name: str, measure: dict[str, Any]) -> tuple[str, str, str]:
    return name, *shown(measure)


def _table(title: str, what: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title)
    table.add_column("noise")
    table.add_column(what, justify="right")
    table.add_column("95 % interval", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def print_preflight(result: dict[str, Any]) -> None:
    """Print what preflight measured and recommends."""
    rows = [_row(name, m) for name, m in result["conditions"].items()]
    best = result["best_of"]
    rows += [_row(f"{name}, best of {best['k']}", m) for name, m in best.items() if name != "k"]
    console = Console()
    console.print(_table(f"{result['base']} on {result['task']}, {result['episodes']} episodes", "success", rows))
    advice = result["recommendation"]
    console.print(f"noise sensitivity of the executed actions: {result['noise_sensitivity']:.3f}")
    console.print(advice["words"])
    what = "recommended" if advice["worth_steering"] else "if you train all the same"
    console.print(f"{what}: --noise.layout {advice['layout']} --noise.bound {advice['bound']:g}")


def print_reach(base: str, data: Path, found: list[Reachability]) -> None:
    """Print how near noise comes to what was done, in each layout."""
    table = Table(title=f"{base} on {data}, {len(found[0].reach)} decisions")
    for name in ("layout", "bound", "numbers", "reach"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    table.add_column("its 10, 50 and 90 %", justify="right")
    for each in found:
        told, (vectors, columns) = each.to_json(), each.layout.latent_shape
        below = ", ".join(f"{value:.2f}" for value in told["quantiles"].values())
        table.add_row(told["layout"], f"{told['bound']:g}", str(vectors * columns), f"{each.mean:.2f}", below)
    Console().print(table)


def print_evaluation(result: dict[str, Any]) -> None:
    """Print a paired evaluation."""
    rows, what = [_row("base", result["base"])], yardstick(result["base"]).name
    rows += [_row(f"control: {name}", m) for name, m in result["controls"].items()]
    rows += [_row("steered", result["steered"]), _row("steered, stochastic", result["steered_stochastic"])]
    console = Console()
    console.print(_table(f"{result['task']}, {result['episodes']} held-out episodes", what, rows))
    for uri, each in result.get("tasks", {}).items():
        console.print(_table(uri, what, [_row("base", each["base"]), _row("steered", each["steered"])]))
    console.print(f"steered less base, paired: {' '.join(shown_gain(result))}")
