"""The numbers of a comparison: every setting and method over the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.statistics import MeanStd, mean_std

CLIENT_ALONE = "one client alone"
MEANS = (  # of a group beside its accuracy: key, heading, format
    ("accuracy_averaged", "of the average", ".3f"),  # where clients keep a part
    ("accuracy_local", "local", ".3f"),
    ("aggregation_error", "error", ".3f"),
    ("aggregation_error_plain", "plain", ".3f"),
    ("rotation_angle", "angle", ".1f"),
    ("rank", "rank", ".1f"),  # of methods that choose it, or whose clients do
)


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

    def spreads(self, key: str) -> dict[str, dict[str, MeanStd | None]]:
        """Per setting, and per method of any setting, mean and deviation over seeds."""
        methods = dict.fromkeys(group.method for group in self.groups)
        found = {(g.setting, g.method): mean_std(g.values(key)) for g in self.groups}
        return {self.label(s): {m: found.get((s, m)) for m in methods} for s in self.settings}


def clients_alone(group: Group) -> Group | None:
    """The mean single client of one-shot runs as a group of its own."""
    if any("client_accuracy" not in s for s in group.summaries):
        return None
    summaries = [
        {"seed": s["seed"], "synthetic": s["synthetic"], "accuracy": s["client_accuracy"]}
        for s in group.summaries
    ]
    return Group(group.setting, CLIENT_ALONE, summaries, [], [])
