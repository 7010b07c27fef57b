"""What the runs of an experiment say: means, paired differences, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedrot.simulation.run_dir import RunDir
from fedrot.statistics import Difference, MeanStd, mean_std, paired
from fedrot.sweep.experiment import Cell, Experiment
from fedrot.sweep.runner import Outcome, Summary


@dataclass(frozen=True)
class Results:
    """The outcomes of an experiment, by cell and method."""

    experiment: Experiment
    outcomes: Sequence[Outcome]

    @property
    def cells(self) -> list[Cell]:
        return self.experiment.cells

    @property
    def methods(self) -> list[str]:
        return [variant.label for variant in self.experiment.methods]

    def of(self, cell: Cell, method: str) -> Outcome:
        return next(o for o in self.outcomes if o.cell == cell and o.variant.label == method)

    def values(self, cell: Cell, method: str, key: str) -> list[float]:
        """One number a seed, of the runs that did not fail."""
        return [v for s in self.of(cell, method).summaries if (v := number(s, key)) is not None]

    def spread(self, cell: Cell, method: str, key: str = "accuracy") -> MeanStd | None:
        return mean_std(self.values(cell, method, key))

    def difference(self, cell: Cell, method: str, key: str = "accuracy") -> Difference | None:
        """Against the first method; ``None`` for it, and where fewer than two seeds have both."""
        if method == self.methods[0]:
            return None
        pairs = zip(
            self.of(cell, method).summaries,
            self.of(cell, self.methods[0]).summaries,
            strict=True,
        )
        both = [(number(a, key), number(b, key)) for a, b in pairs]
        return paired([a - b for a, b in both if a is not None and b is not None])

    def curves(self, cell: Cell, method: str, key: str = "accuracy") -> list[list[float]]:
        """An accuracy after rounds 0, 1, ... of every run that did not fail and has it."""
        outcome = self.of(cell, method)
        return [
            [s["start"][key], *(row[key] for row in RunDir(folder).rows())]
            for s, folder in zip(outcome.summaries, outcome.folders, strict=True)
            if s is not None and key in s
        ]

    def as_tree(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        rows = []
        for outcome in self.outcomes:
            cell, method = outcome.cell, outcome.variant.label
            row: dict[str, Any] = {
                "cell": dict(cell.options),
                "method": method,
                "tuned": dict(outcome.tuned.options),
                "trials": [
                    {"options": options, "validation_accuracy": score}
                    for options, score in outcome.tuned.scores
                ],
                "failed_seeds": [
                    self.experiment.first_seed + i
                    for i, summary in enumerate(outcome.summaries)
                    if summary is None
                ],
            }
            for key in KEYS:
                if values := self.values(cell, method, key):
                    mean, std = mean_std(values) or (0.0, None)
                    row[key] = {"mean": mean, "std": std, "values": values}
            if (found := self.difference(cell, method)) is not None:
                row["accuracy_difference"] = {
                    "mean": found.mean,
                    "interval": [found.low, found.high],
                    "pairs": found.pairs,
                }
            rows.append(row)
        experiment = self.experiment
        return {
            "experiment": experiment.name,
            "title": experiment.title,
            "claim": experiment.claim,
            "seeds": experiment.seeds,
            "results": rows,
        }


KEYS = (
    "accuracy",
    "accuracy_averaged",
    "accuracy_local",
    "loss",
    "aggregation_error",
    "error_ratio",
    "rotation_angle",
    "seconds_local",
    "seconds_aggregation",
)


def number(summary: Summary | None, key: str) -> float | None:
    """One number of a run; ``error_ratio`` is the aggregation error relative to that of plain
    averaging on the same uploads, ``None`` where that is rounding (one factor is shared)."""
    if summary is None:
        return None
    if key != "error_ratio":
        return float(summary[key]) if key in summary else None
    plain = summary.get("aggregation_error_plain")
    return float(summary["aggregation_error"]) / plain if plain and plain > 1e-5 else None
