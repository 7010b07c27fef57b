"""Pictures of an experiment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedrot.report.plots import COLORS, PLAIN, THEMES, png_bytes, themed_figure

MARKERS = "os^Dv<>P*X"

Spread = tuple[float, float | None] | None
Interval = tuple[float, float, float] | None  # mean, low, high


def shortened(text: str) -> str:
    """Without its middle where it is long: it would push the axes out of the picture."""
    return text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}"


def over_axis(
    axis: str,
    values: Sequence[str],
    lines: Mapping[str, Sequence[Spread]],
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
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="-" if index < len(COLORS) else "--",
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
        figure.legend(loc="outside right upper", frameon=False)
        return png_bytes(figure)


def differences(
    panels: Mapping[str, Mapping[str, Interval]], xlabel: str, theme: str = "light"
) -> bytes:
    """Paired difference against the baseline with its 95 % interval, a panel a cell."""
    with _panels(panels, xlabel, theme) as (figure, axes):
        for ax, rows in zip(axes, panels.values(), strict=True):
            ax.axvline(0, color=THEMES[theme]["soft"], linewidth=1)
            for y, found in enumerate(rows.values()):
                if found is None:
                    continue
                mean, low, high = found
                certain = low > 0 or high < 0
                color = COLORS[0] if certain else PLAIN
                ax.errorbar(
                    mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3
                )
        return png_bytes(figure)


def bars(
    panels: Mapping[str, Mapping[str, Spread]],
    xlabel: str,
    *,
    line: float | None = None,
    theme: str = "light",
) -> bytes:
    """Mean and standard deviation as horizontal bars, a panel a cell; ``line``: a value to
    compare with."""
    with _panels(panels, xlabel, theme) as (figure, axes):
        for ax, rows in zip(axes, panels.values(), strict=True):
            for y, found in enumerate(rows.values()):
                if found is None:
                    continue
                mean, std = found
                ax.barh(y, mean, xerr=std or 0.0, color=COLORS[0], height=0.7, capsize=2,
                        ecolor=THEMES[theme]["ink"])  # fmt: skip
            if line is not None:
                ax.axvline(line, color=THEMES[theme]["soft"], linewidth=1, linestyle="--")
        return png_bytes(figure)


@contextmanager
def _panels(
    panels: Mapping[str, Mapping[str, object]], xlabel: str, theme: str
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A panel a cell with a line a method, all on the same axis."""
    labels = list(next(iter(panels.values())))
    width = 2.4 + 2.6 * len(panels)
    lines = textwrap.wrap(xlabel, int(11 * width), break_on_hyphens=False)
    titles = [
        "\n".join(textwrap.wrap(title, 33, max_lines=4, placeholder=" …", break_on_hyphens=False))
        for title in panels
    ]
    most = max(title.count("\n") for title in titles)
    height = 0.93 + 0.28 * len(labels) + 0.17 * (len(lines) + most)
    with themed_figure(theme, len(panels), width, height, shared=True) as (figure, axes):
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="left", fontsize=10)
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=5)  # labels of more would touch
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.supxlabel("\n".join(lines), fontsize=10)
        yield figure, axes
