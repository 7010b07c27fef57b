"""Means over seeds, and differences paired by seed with how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

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


def mean_std(values: Sequence[float] | None) -> MeanStd | None:
    """Mean and sample standard deviation, which one value has not, nor values that are not
    finite."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def plus_minus(found: MeanStd | None, form: str) -> str:
    """``mean ± std``, the mean alone of a single seed, a dash where there is nothing; a sign that
    ``form`` asks for is that of the mean."""
    if found is None:
        return "-"
    mean, std = found
    return format(mean, form) + ("" if std is None else f" ± {std:{form.removeprefix('+')}}")


def paired(differences: Sequence[float]) -> Difference | None:
    """Their mean and its interval; ``None`` for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = statistics.fmean(differences)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
