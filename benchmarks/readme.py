"""The tables of times in docs/benchmarks.md, and the newest of them in the README, out of
benchmarks/results:
``python -m benchmarks.readme``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.bench.tables import Row, of_floor, ratio, times
from fedrot.files import write_text
from fedrot.report import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- from benchmarks/results by `python -m benchmarks.readme` -->\n"
END = "<!-- end of benchmarks/results -->\n"
DTYPES = ("float32", "bfloat16")
PAGES = ("README.md", "docs/benchmarks.md")
BATCHED = ("stacked", "per_layer", "compiled")
HEADER = (
    *("case", "per-client loop", "batched PyTorch", "plain mean", "`_foreach` mean"),
    *("of floor", "`Plan`, of floor"),
)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of every kind of machine, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def block(results: Sequence[dict[str, Any]], *dtypes: str) -> str:
    """What stands between the markers: for each type and machine one line and one table."""
    return "\n".join(
        filter(None, (_table(result, dtype) for dtype in dtypes for result in results))
    )


def block_of(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The block of one of ``PAGES``."""
    if page == "README.md":
        return block([max(results, key=lambda result: str(result["machine"]["date"]))], "float32")
    return block(results, *DTYPES)


def replaced(page: str, made: str) -> str:
    """The page with its block replaced.

    Raises:
        ValueError: the page has no such block.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must hold the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + made + end + after


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
    return title + markdown.table(HEADER, [_line(row) for row in rows])


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
    for name in PAGES:
        path = ROOT / name
        write_text(path, replaced(path.read_text(encoding="utf-8"), block_of(name, load())))
