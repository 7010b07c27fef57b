"""The README's table of times, out of benchmarks/results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.bench.tables import Row, markdown, of_floor, ratio, times
from fedrot.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- from benchmarks/results by `python -m benchmarks.readme` -->\n"
END = "<!-- end of benchmarks/results -->\n"
BATCHED = ("stacked", "per_layer", "compiled")
HEADER = (
    *("case", "per-client loop", "batched PyTorch", "plain mean", "`_foreach` mean"),
    *("of floor", "`Plan`, of floor"),
)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of every kind of machine, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def block(results: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers: for each machine and dtype one line and one table."""
    tables = [_table(result, dtype) for result in results for dtype in ("float32", "bfloat16")]
    return "\n".join(filter(None, tables))


def replaced(readme: str, results: Sequence[dict[str, Any]]) -> str:
    """The README with its block made anew.

    Raises:
        ValueError: the README has no such block.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + block(results) + end + after


def _table(result: dict[str, Any], dtype: str) -> str:
    rows = [r for r in result["cases"] if (r["dtype"], r["align"]) == (dtype, "A")]
    if not rows:
        return ""
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['instruction_set']}"
    title = (
        f"{where}, {machine['threads']} threads, {dtype}, align A "
        f"({machine['date'][:10]}, torch {machine['torch']}):\n\n"
    )
    return title + markdown(HEADER, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    batched = min(filter(None, (ratio(row, form) for form in BATCHED)))
    return [
        row["case"],
        times(ratio(row, "loop")),
        times(batched),
        times(ratio(row, "mean")),
        times(ratio(row, "foreach_mean")),
        of_floor(row, "fedrot"),
        of_floor(row, "plan"),
    ]


if __name__ == "__main__":
    path = ROOT / "README.md"
    write_text(path, replaced(path.read_text(encoding="utf-8"), load()))
