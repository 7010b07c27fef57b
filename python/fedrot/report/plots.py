"""Pictures of runs and comparisons, as PNG bytes for a light or a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "soft": "#6b7280", "grid": "#e5e7eb"},
    "dark": {"paper": "#161b22", "ink": "#e6edf3", "soft": "#9aa4b2", "grid": "#2d333b"},
}
# Okabe-Ito: told apart with any colour vision, on light and on dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PLAIN = "#8a8f98"

Rows = Sequence[Mapping[str, Any]]


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
        ax.bar(range(1, len(scores) + 1), scores, color=PLAIN, label="one client alone")
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
        left.plot(rounds, plain, color=PLAIN, label="plain averaging", linewidth=4, **style)
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
    """Accuracy over rounds, mean and std band over seeds; ``curves[method][seed][round]``."""
    with themed_figure(theme, 1, width=6.4) as (figure, (ax,)):
        length = 0
        for index, (method, seeds) in enumerate(curves.items()):
            values = np.array(seeds)
            length = values.shape[1] - 1
            mean, std = values.mean(0), _std(values)
            # Dashes keep a curve visible that another one covers.
            style = {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index == 0 else "--"}
            ax.plot(mean, label=method, **style)
            ax.fill_between(
                range(length + 1), mean - std, mean + std, alpha=0.18, color=style["color"], lw=0
            )
        _title(ax, title)
        _accuracy_axis(ax, ylabel)
        _rounds_axis(ax, length)
        _legend(ax)
        return png_bytes(figure)


def grouped_bars(
    groups: Sequence[str],
    bars: Mapping[str, Sequence[Sequence[float] | None]],
    ylabel: str,
    *,
    accuracy: bool = False,
    theme: str = "light",
) -> bytes:
    """Mean and std over seeds as bars, a group a setting; ``bars[label][group]`` are the seeds.

    ``None`` leaves a bar out. Unless ``accuracy``, every group has an axis of its own, since
    errors of different settings differ by orders of magnitude.
    """
    panels = 1 if accuracy else len(groups)
    with themed_figure(theme, panels, width=7.2 if accuracy else 3.2 * panels) as (figure, axes):
        for group, name in enumerate(groups):
            ax = axes[0 if accuracy else group]
            shown = [(label, seeds[group]) for label, seeds in bars.items() if seeds[group]]
            width = 0.8 / max(len(shown), 1)
            for index, (label, values) in enumerate(shown):
                assert values is not None
                x = (group if accuracy else 0) + (index - (len(shown) - 1) / 2) * width
                color = _bar_color(label, list(bars))
                _bar(ax, x, values, width * 0.92, label, color, theme, accuracy)
            if accuracy:
                ax.set_xticks(range(len(groups)), groups)
                _accuracy_axis(ax)
            else:
                _title(ax, name)
                ax.set_xticks([])
                ax.margins(y=0.12)
            ax.grid(axis="x", visible=False)
        axes[0].set_ylabel(ylabel)
        _legend_below(figure, axes)
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


def _bar(
    ax: Axes,
    x: float,
    values: Sequence[float],
    width: float,
    label: str,
    color: str,
    theme: str,
    accuracy: bool,
) -> None:
    mean, std = float(np.mean(values)), float(_std(np.array(values)))
    ink = THEMES[theme]["ink"]
    error = {"ecolor": ink, "elinewidth": 1, "capsize": 3}
    ax.bar(
        x,
        mean,
        width,
        yerr=std if len(values) > 1 else None,
        color=color,
        label=label,
        error_kw=error,
    )
    text = f"{mean:.2f}" if accuracy else f"{mean:.3g}"
    ax.annotate(
        text,
        (x, mean + std),
        (0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=ink,
    )


def _bar_color(label: str, labels: list[str]) -> str:
    if label in ("plain averaging", "one client alone"):
        return PLAIN
    return COLORS[[n for n in labels if n != "plain averaging"].index(label) % len(COLORS)]


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


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, every label once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        handles=list(found.values()),
        labels=list(found),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )


@contextmanager
def themed_figure(
    theme: str, panels: int, width: float, height: float = 3.6, *, shared: bool = False
) -> Any:
    """A figure with ``panels`` axes side by side in the colours of the page; ``shared``: of the
    same range in both directions, with labels at the left alone."""
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
        axes = figure.subplots(1, panels, squeeze=False, sharex=shared, sharey=shared)
        yield figure, list(axes[0])


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
