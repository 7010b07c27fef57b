"""The tables of a run: on the terminal, and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

BASELINES = {
    "loop": "loop",
    "stacked": "stacked",
    "per_layer": "per layer",
    "compiled": "compiled",
    "mean": "mean",
    "foreach_mean": "foreach mean",
}
FLOOR = (
    "floor: max(bytes / read bandwidth, flops / sgemm rate), both measured in turns with the rest; "
    "GB/s counts every client factor once. Plan: checked and outputs allocated beforehand."
)
FORMS = (
    "loop: the paper's, by layer and client, two SVDs; stacked, per layer: batched forms; "
    "compiled: stacked under torch.compile; mean, foreach mean: plain averaging, aligns nothing."
)


def fedrot_time(row: Row) -> float:
    return row["times"]["fedrot"]["median"]


def ratio(row: Row, form: str) -> float | None:
    """How many times longer ``form`` takes than the operator; ``None`` where it was not run."""
    timing = row["times"].get(form)
    return timing and timing["median"] / fedrot_time(row)


def bound(row: Row) -> str:
    """What the floor consists of: ``memory`` or ``arithmetic``."""
    return "memory" if row["floor"] > row["flops"] / row["sgemm"] else "arithmetic"


def of_floor(row: Row, form: str) -> str:
    """How many times the floor a form takes; empty where it was not run."""
    timing = row["times"].get(form)
    return f"{timing['median'] / row['floor']:.2f}" if timing else ""


def times(value: float | None) -> str:
    """A ratio as text; empty for ``None``."""
    if value is None:
        return ""
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def show(result: Row) -> None:
    """Print every table of the run."""
    from rich.console import Console

    console = Console(highlight=False)
    # Off a terminal rich would cut the tables at 80 columns.
    console.width = console.width if console.is_terminal else 120
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']} ({machine['instruction_set']})"
    console.print(f"\n{where}, {machine['threads']} threads, torch {machine['torch']}")
    _print(console, "align_aggregate", *operator_table(result["cases"]))
    console.print(FLOOR)
    title = "the same in plain PyTorch: how many times longer"
    _print(console, title, *baseline_table(result["cases"]))
    console.print(FORMS)
    if result["not_compiled"]:
        console.print(f"compiled: {result['not_compiled']}")
    if "stages" in result:
        _print(console, "stages (ms)", *stage_table(result["stages"]))
    for sweep, rows in result.get("scaling", {}).items():
        _print(console, f"scaling: {sweep}", *sweep_table(rows))
    if "threads" in result:
        _print(console, "threads", *thread_table(result["threads"]))
    if "polar" in result:
        _print(console, "polar of 32 matrices (ms)", *polar_table(result["polar"]))
    if "truncation" in result:
        title = "exact truncation of one layer (ms)"
        _print(console, title, *truncation_table(result["truncation"]))
    console.print(f"\n{result['seconds']:.0f} seconds in all")


def operator_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        seconds = fedrot_time(row)
        lines.append(
            [
                row["case"],
                row["dtype"],
                row["align"],
                _ms(seconds),
                f"{row['bytes'] / seconds / 1e9:.1f}",
                f"{row['flops'] / seconds / 1e9:.0f}",
                _ms(row["floor"]),
                bound(row),
                f"{seconds / row['floor']:.2f}",
                of_floor(row, "plan"),
            ]
        )
    header = ["case", "dtype", "align", "ms", "GB/s", "GFLOP/s", "floor ms", "bound by"]
    return [*header, "x floor", "Plan x floor"], lines


def baseline_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    used = [name for name in BASELINES if any(name in row["times"] for row in rows)]
    lines = [
        [row["case"], row["dtype"], row["align"], *(times(ratio(row, name)) for name in used)]
        for row in rows
    ]
    return ["case", "dtype", "align", *(BASELINES[name] for name in used)], lines


def stage_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    parts = ("whole", "covariance", "polar", "soft", "apply", "svd")
    lines = [
        [
            row["case"],
            row["dtype"],
            row["align"],
            *(_ms(row[part]) for part in parts),
            f"{(row['polar'] + row['soft']) / row['whole']:.0%}",
        ]
        for row in rows
    ]
    return ["case", "dtype", "align", *parts, "(polar + soft) / whole"], lines


def sweep_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    used = [name for name in BASELINES if name in rows[0]["times"]]
    lines = []
    for index, row in enumerate(rows):
        seconds = fedrot_time(row)
        lines.append(
            [
                row["value"],
                _ms(seconds),
                f"{row['bytes'] / seconds / 1e9:.1f}",
                f"{row['flops'] / seconds / 1e9:.0f}",
                f"{seconds / row['floor']:.2f}",
                f"{cliff(rows, index):.2f}",
                *(times(ratio(row, name)) for name in used),
            ]
        )
    header = ["value", "ms", "GB/s", "GFLOP/s", "x floor", "/ neighbours"]
    return header + [BASELINES[name] for name in used], lines


def cliff(rows: Sequence[Row], index: int) -> float:
    """Time over floor, relative to the worse neighbour's: well above 1 is a cliff."""
    over = [fedrot_time(row) / row["floor"] for row in rows]
    neighbours = over[max(0, index - 1) : index] + over[index + 1 : index + 2]
    return over[index] / max(neighbours)


def thread_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        one = next(r for r in rows if r["case"] == row["case"] and r["threads"] == 1)
        seconds = fedrot_time(row)
        lines.append(
            [
                row["case"],
                str(row["threads"]),
                _ms(seconds),
                f"{seconds / row['floor']:.2f}",
                bound(row),
                f"{fedrot_time(one) / seconds:.2f}",
            ]
        )
    return ["case", "threads", "ms", "x floor", "bound", "times one thread"], lines


def polar_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [str(r["rank"]), _ms(r["polar"]), _ms(r["svd"]), times(r["svd"] / r["polar"])] for r in rows
    ]
    return ["rank", "fedrot.polar", "torch.linalg.svd", "svd / polar"], lines


def truncation_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [
            f"{r['d']}x{r['k']}",
            *(str(n) for n in (r["rank"], r["clients"], r["rank"] * r["clients"])),
            *(_ms(r[form]) for form in ("dense", "qr", "gram")),
            *(times(r[form] / r["gram"]) for form in ("dense", "qr")),
        ]
        for r in rows
    ]
    forms = ("dense SVD", "QR form", "Gram blocks", "dense / Gram", "QR / Gram")
    return ["d x k", "rank", "clients", "N r", *forms], lines


def _print(console: Any, title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for index, line in enumerate(lines):
        last = index + 1 == len(lines) or lines[index + 1][0] != line[0]
        table.add_row(*line, end_section=last and len(lines) > 12)
    console.print(table)


def _ms(seconds: float) -> str:
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
