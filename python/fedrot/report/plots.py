"""Pictures of runs and comparisons, as PNG bytes for a light or a dark page."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedrot.results import CLIENT_ALONE
from fedrot.statistics import MeanStd

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "soft": "#6b7280", "grid": "#e5e7eb"},
    "dark": {"paper": "#161b22", "ink": "#e6edf3", "soft": "#9aa4b2", "grid": "#2d333b"},
}
# Okabe-Ito: told apart with any colour vision, on light and on dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PLAIN = "#8a8f98"
# Four lines and thirteen markers for six colors: of up to twelve methods no two have the same color
# and line. Neighbours never have the same line, so one shows where it lies on the other.
LINES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>P*Xphd"
PLAIN_AVERAGING = "plain averaging"

Rows = Sequence[Mapping[str, Any]]


def look(index: int) -> dict[str, Any]:
    """How a method is drawn, by its place among those of a report: the same in every picture."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def accuracy_over_rounds(rows: Rows, start: float, title: str, theme: str = "light") -> bytes:
    """Accuracy of the global model after every round, from round 0 (the untrained adapter)."""
    with themed_figure(theme, 1, width=6.4) as (figure, (ax,)):
        rounds = [0, *(row["round"] for row in rows)]
        accuracy = [start, *(row["accuracy"] for row in rows)]
        ax.plot(rounds, accuracy, color=COLORS[0], marker="o", markersize=3.5)
        _title(ax, title)
        _accuracy_axis(ax)
        _rounds_axis(ax, len(rows))
        return png_bytes(figure)


def client_accuracies(
    row: Mapping[str, Any], method: str, title: str, theme: str = "light"
) -> bytes:
    """Accuracy of every single client's adapter beside that of the merged one (one-shot)."""
    with themed_figure(theme, 1, width=6.4) as (figure, (ax,)):
        scores = sorted(row["client_accuracies"])
        ax.bar(range(1, len(scores) + 1), scores, color=PLAIN, label=CLIENT_ALONE)
        ax.axhline(row["accuracy"], color=COLORS[0], linewidth=2, label=f"merged by {method}")
        _title(ax, title)
        ax.set_xlabel("clients, by accuracy")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _accuracy_axis(ax)
        _legend(ax)
        return png_bytes(figure)


def alignment_over_rounds(rows: Rows, method: str, title: str, theme: str = "light") -> bytes:
    """Aggregation error of the same uploads by the method and by plain averaging; the angles."""
    rounds = [row["round"] for row in rows]
    marker = "o" if len(rounds) < 40 else ""
    with themed_figure(theme, 2, width=9.6) as (figure, (left, right)):
        style = {"markersize": 3.5, "marker": marker}
        plain = [row["aggregation_error_plain"] for row in rows]
        left.plot(rounds, plain, color=PLAIN, label=PLAIN_AVERAGING, linewidth=4, **style)
        own = [row["aggregation_error"] for row in rows]
        left.plot(rounds, own, color=COLORS[0], label=method, **style)
        left.set_ylabel("aggregation error, Frobenius norm")
        left.set_ylim(bottom=0)
        _title(left, title)
        _legend(left)
        angles = [row["rotation_angle"] for row in rows]
        right.plot(rounds, angles, color=COLORS[2], **style)
        right.set_ylabel("mean angle to the reference, degrees")
        right.set_ylim(0, max(1.0, 1.15 * max(angles)))
        for ax in (left, right):
            _rounds_axis(ax, len(rows), from_zero=False)
        return png_bytes(figure)


def ranks_over_rounds(rows: Rows, largest: int, title: str, theme: str = "light") -> bytes:
    """The rank that each layer got in every round, their mean, and the largest possible."""
    with themed_figure(theme, 1, width=6.4) as (figure, (ax,)):
        rounds = [row["round"] for row in rows]
        for module in rows[0]["ranks"]:
            ranks = [row["ranks"][module] for row in rows]
            ax.plot(rounds, ranks, color=COLORS[0], alpha=0.4, linewidth=1)
        means = [row["rank"] for row in rows]
        ax.plot(rounds, means, color=COLORS[0], linewidth=2.5, marker="o", markersize=3.5)
        ax.axhline(largest, color=PLAIN, linestyle="--", linewidth=1)
        ax.set_ylabel("rank")
        ax.set_ylim(0, largest + 0.5)
        ax.yaxis.get_major_locator().set_params(integer=True)
        _title(ax, title)
        _rounds_axis(ax, len(rows), from_zero=False)
        return png_bytes(figure)


def mean_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    ylabel: str = "test accuracy",
    theme: str = "light",
) -> bytes:
    """Accuracy over rounds, mean and std band over seeds; ``curves[method][seed][round]``. A method
    without seeds is left out."""
    with themed_figure(theme, 1, width=8.4, height=4.4) as (figure, (ax,)):
        length = max(len(seed) for seeds in curves.values() for seed in seeds) - 1
        step = max(1, math.ceil(length / 12))
        alpha = min(0.18, 0.6 / len(curves))  # those of many methods lie on one another
        for index, (method, seeds) in enumerate(curves.items()):
            if not seeds:
                continue
            values, style = np.array(seeds), look(index)
            mean, std = values.mean(0), _std(values)
            ax.plot(mean, label=method, markersize=4, markevery=(index % step, step), **style)
            ax.fill_between(
                range(len(mean)), mean - std, mean + std, alpha=alpha, color=style["color"], lw=0
            )
        _title(ax, title)
        _accuracy_axis(ax, ylabel)
        _rounds_axis(ax, length)
        legend_beside(figure)
        return png_bytes(figure)


def bars(
    panels: Mapping[str, Mapping[str, MeanStd | None]],
    xlabel: str,
    form: str,
    *,
    line: float | None = None,
    alike: bool = True,
    theme: str = "light",
) -> bytes:
    """Mean and standard deviation as horizontal bars, ``panels[panel][method]``, with the mean
    written in ``form``; ``None`` leaves a bar out.

    ``line``: a value to compare with. Unless ``alike``, every panel has a range of its own.
    """
    colors = _bar_colors([*next(iter(panels.values()))])
    shown = [[*filter(None, rows.values())] for rows in panels.values()]
    ends = [[mean + (std or 0.0) for mean, std in found] for found in shown]
    behind = {"facecolor": THEMES[theme]["paper"], "edgecolor": "none", "pad": 1}  # no line there
    if alike:
        ends = [[*itertools.chain(*ends)]] * len(ends)
    with method_panels(panels, xlabel, theme, alike=alike) as (figure, axes):
        for ax, rows, own in zip(axes, panels.values(), ends, strict=True):
            for y, (method, found) in enumerate(rows.items()):
                if found is None:
                    continue
                mean, std = found
                ax.barh(y, mean, xerr=std, color=colors[method], height=0.7, capsize=2,
                        ecolor=THEMES[theme]["ink"])  # fmt: skip
                ax.annotate(format(mean, form), (mean + (std or 0.0), y), (4, 0), va="center",
                            textcoords="offset points", fontsize=8, bbox=behind)  # fmt: skip
            ax.set_xlim(0, 1.35 * max([line or 0.0, *own]) or 1.0)  # room for the numbers
            if line is not None:
                ax.axvline(line, color=THEMES[theme]["soft"], linewidth=1, linestyle="--")
        return png_bytes(figure)


def spectrum(
    values: Mapping[str, Sequence[float]],
    ranks: Mapping[str, int],
    energy: float,
    theme: str = "light",
) -> bytes:
    """Singular values of every layer beside its largest, and the share of the squares that a rank
    keeps; a dot at the rank chosen."""
    with themed_figure(theme, 2, width=9.6) as (figure, (left, right)):
        for name, row in values.items():
            if not row:
                continue  # an update of zero
            share, squares = np.array(row) / row[0], np.square(row)
            kept, x = np.cumsum(squares) / squares.sum(), np.arange(1, len(row) + 1)
            for ax, y in ((left, share), (right, kept)):
                ax.plot(x, y, color=COLORS[0], alpha=0.4, linewidth=1)
                rank = min(ranks[name], len(row))
                ax.plot(rank, y[rank - 1], "o", color=COLORS[1], markersize=4)
        right.axhline(energy, color=PLAIN, linestyle="--", linewidth=1)
        left.set_yscale("log")
        left.set_ylabel("singular value, relative to the largest")
        right.set_ylabel("share of the squares kept")
        right.set_ylim(0, 1.02)
        _title(left, f"exact mean of the adapters, {len(values)} layers")
        for ax in (left, right):
            ax.set_xlabel("rank")
            ax.xaxis.get_major_locator().set_params(integer=True)
        return png_bytes(figure)


def _bar_colors(labels: Sequence[str]) -> dict[str, str]:
    """Those of :func:`look`, and grey for what is no method."""
    methods = [label for label in labels if label not in (PLAIN_AVERAGING, CLIENT_ALONE)]
    colors = {method: look(index)["color"] for index, method in enumerate(methods)}
    return {label: colors.get(label, PLAIN) for label in labels}


def _std(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first dimension; 0 for a single seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=10)


def _accuracy_axis(ax: Axes, ylabel: str = "test accuracy") -> None:
    ax.set_ylim(0, 1.02)
    ax.set_ylabel(ylabel)


def _rounds_axis(ax: Axes, rounds: int, from_zero: bool = True) -> None:
    ax.set_xlabel("round")
    margin = 0.02 * rounds if from_zero else 0.5
    ax.set_xlim((0 if from_zero else 1) - margin, rounds + margin)
    step = max(1, math.ceil(rounds / 12))
    ax.set_xticks(range(0 if from_zero else step, rounds + 1, step))


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=9)


def legend_beside(figure: Figure) -> None:
    """Of all methods, where it hides nothing; long enough for dashes to be seen."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [_wrapped(label) for label in labels]
    figure.legend(handles, labels, loc="outside right upper", frameon=False, handlelength=3)


@contextmanager
def method_panels(
    panels: Mapping[str, Mapping[str, object]], xlabel: str, theme: str, *, alike: bool = True
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels side by side with a line a method, named at the left; ``alike``: of one range."""
    labels = [_wrapped(label) for label in next(iter(panels.values()))]
    titles = [_wrapped(title, 33) for title in panels]
    width = 2.4 + 2.6 * len(panels)
    xlabel = _wrapped(xlabel, int(11 * width))
    row = 0.28 + 0.17 * max(label.count("\n") for label in labels)
    lines = 1 + xlabel.count("\n") + max(title.count("\n") for title in titles)
    height = 0.93 + row * len(labels) + 0.17 * lines
    figures = themed_figure(theme, len(panels), width, height, sharex=alike, sharey=True)
    with figures as (figure, axes):
        for ax, title in zip(axes, titles, strict=True):
            _title(ax, title)
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=5)  # labels of more would touch
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.supxlabel(xlabel, fontsize=10)
        yield figure, axes


def _wrapped(text: str, width: int = 30) -> str:
    """In lines of up to ``width`` characters: longer ones would push the axes out of a picture."""
    lines = textwrap.wrap(text, width, max_lines=4, placeholder=" …", break_on_hyphens=False)
    return "\n".join(lines)


@contextmanager
def themed_figure(
    theme: str,
    panels: int,
    width: float,
    height: float = 3.6,
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> Any:
    """A figure with ``panels`` axes side by side in the colours of the page; of the same range
    where they share it, with labels at the left alone."""
    colors = THEMES[theme]
    style: Any = {
        "figure.facecolor": colors["paper"],
        "axes.facecolor": colors["paper"],
        "savefig.facecolor": colors["paper"],
        "text.color": colors["ink"],
        "axes.labelcolor": colors["ink"],
        "axes.edgecolor": colors["soft"],
        "xtick.color": colors["soft"],
        "ytick.color": colors["soft"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colors["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context(style):
        # No pyplot: nothing global, no window, nothing to close.
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False, sharex=sharex, sharey=sharey)
        yield figure, list(axes[0])


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig() lays out a figure twice
    return buffer.getvalue()
