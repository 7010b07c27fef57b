"""Pictures of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedrot.report.plots import (
    PLAIN,
    THEMES,
    legend_beside,
    look,
    method_panels,
    png_bytes,
    themed_figure,
)
from fedrot.statistics import Difference, MeanStd


def shortened(text: str) -> str:
    """Without its middle where it is long: it would push the axes out of the picture."""
    return text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}"


def over_axis(
    axis: str,
    values: Sequence[str],
    lines: Mapping[str, Sequence[MeanStd | None]],
    ylabel: str,
    theme: str = "light",
) -> bytes:
    """Mean and standard deviation over seeds along a varied option, a line a method."""
    with themed_figure(theme, 1, width=8.4, height=4.4) as (figure, (ax,)):
        xs = np.arange(len(values))
        for index, (label, points) in enumerate(lines.items()):
            shown = [(x, *p) for x, p in zip(xs, points, strict=True) if p is not None]
            # A little apart, so that bars of equal means do not hide each other.
            shift = (index - (len(lines) - 1) / 2) * 0.3 / max(len(lines), 1)
            ax.errorbar(
                [x + shift for x, _, _ in shown],
                [mean for _, mean, _ in shown],
                yerr=[std or 0.0 for _, _, std in shown],
                label=label,
                **look(index),
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
            )
        texts = [shortened(value) for value in values]
        tilt = {"rotation": 20, "ha": "right"} if len("".join(texts)) > 60 else {}  # side by side
        ax.set_xticks(xs, texts, **tilt)
        ax.set_xlabel(axis)
        ax.set_ylabel(ylabel)
        legend_beside(figure)
        return png_bytes(figure)


def differences(
    panels: Mapping[str, Mapping[str, Difference | None]], xlabel: str, theme: str = "light"
) -> bytes:
    """Paired difference against the baseline with its 95 % interval, a panel a cell; grey unless it
    is certain. The methods are all of a report but the first."""
    with method_panels(panels, xlabel, theme) as (figure, axes):
        for ax, rows in zip(axes, panels.values(), strict=True):
            ax.axvline(0, color=THEMES[theme]["soft"], linewidth=1)
            for y, found in enumerate(rows.values()):
                if found is None:
                    continue
                color = look(y + 1)["color"] if found.certain else PLAIN  # the baseline is 0
                sides = [[found.mean - found.low], [found.high - found.mean]]
                ax.errorbar(found.mean, y, xerr=sides, fmt="o", color=color, capsize=3)
        return png_bytes(figure)
