"""The numbers of a comparison: every setting and method over the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

CLIENT_ALONE = "one client alone"

MeanStd = tuple[float, float | None]  # std is None for a single seed


@dataclass(frozen=True)
class Difference:
    """A method against its baseline, paired by seed."""

    mean: float
    low: float  # 95 % interval, Student's t over seeds
    high: float
    pairs: int

    @property
    def enough(self) -> bool:
        """Two seeds say nothing: equal differences of theirs have no spread at all."""
        return self.pairs > 2

    @property
    def certain(self) -> bool:
        return self.enough and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, one per seed."""

    setting: str
    method: str
    summaries: Sequence[Mapping[str, Any]]
    curves: Sequence[Sequence[float]]  # accuracy per seed, after rounds 0, 1, ...
    folders: Sequence[Path]

    @property
    def synthetic(self) -> bool:
        return bool(self.summaries[0].get("synthetic"))

    @property
    def label(self) -> str:
        """The setting, marked where the mismatch between clients is planted."""
        return f"{self.setting} (synthetic)" if self.synthetic else self.setting

    def values(self, key: str) -> list[float] | None:
        """One number per seed; ``None`` where the group does not have it."""
        found = [s[key] for s in self.summaries if key in s]
        return found or None


@dataclass(frozen=True)
class Comparison:
    """Groups by setting, then method; the first method of a setting is its baseline."""

    task: str
    seeds: Sequence[int]
    settings: Sequence[str]
    methods: Sequence[str]
    groups: Sequence[Group]

    def of(self, setting: str) -> list[Group]:
        return [group for group in self.groups if group.setting == setting]

    def label(self, setting: str) -> str:
        return self.of(setting)[0].label

    def differences(self, group: Group) -> list[float]:
        """Accuracy against the baseline, by seed; none for the baseline itself."""
        baseline = self.of(group.setting)[0]
        if group is baseline:
            return []
        pairs = zip(group.summaries, baseline.summaries, strict=True)
        return [a["accuracy"] - b["accuracy"] for a, b in pairs]

    def by_method(self, key: str) -> dict[str, list[list[float] | None]]:
        """Per method, and per setting, the values over seeds."""
        labels = dict.fromkeys(group.method for group in self.groups)
        found = {(g.method, g.setting): g.values(key) for g in self.groups}
        return {m: [found.get((m, s)) for s in self.settings] for m in labels}


def clients_alone(group: Group) -> Group | None:
    """The mean single client of one-shot runs as a group of its own."""
    if any("client_accuracy" not in s for s in group.summaries):
        return None
    summaries = [
        {"seed": s["seed"], "synthetic": s["synthetic"], "accuracy": s["client_accuracy"]}
        for s in group.summaries
    ]
    return Group(group.setting, CLIENT_ALONE, summaries, [], [])


def mean_std(values: Sequence[float] | None) -> MeanStd | None:
    """Mean and sample standard deviation, which one value has not, nor values that are not
    finite."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(differences: Sequence[float]) -> Difference | None:
    """Their mean and its interval; ``None`` for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = statistics.fmean(differences)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
