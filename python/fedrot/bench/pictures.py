"""The pictures of a run: the roofline, and how the cost grows with clients and rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from fedrot.bench.tables import BASELINES, Row
from fedrot.report.plots import COLORS, PLAIN, THEMES, png_bytes, themed_figure

INK = THEMES["light"]["ink"]
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}
LIMITS = ("bandwidth", "sgemm")
STYLES = {  # color, label
    "fedrot": (COLORS[0], "fedrot"),
    **{
        name: (color, BASELINES[name])
        for name, color in zip(
            ("loop", "stacked", "per_layer", "compiled"), COLORS[1:], strict=False
        )
    },
    "mean": (PLAIN, "plain mean"),
}


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    """PNGs by the ending of their names: ``roofline``, and ``scaling`` where it was measured."""
    pictures = {"roofline": roofline(result["cases"])}
    if "scaling" in result:
        sweeps = {name: result["scaling"][name] for name in ("clients", "rank")}
        pictures["scaling"] = growth(sweeps)
    return pictures


def roofline(rows: Sequence[Row]) -> bytes:
    """GFLOP/s over flops per byte of every case, under what the machine allows; one panel for
    each kind of alignment."""
    aligns = list(dict.fromkeys(row["align"] for row in rows))
    with themed_figure("light", len(aligns), max(7.8, 6.0 * len(aligns)), 4.4) as (figure, axes):
        for ax, align in zip(axes, aligns, strict=True):
            _roof(ax, [row for row in rows if row["align"] == align])
            ax.set_title(f"align {align}", loc="left", fontsize=10)
        axes[0].set_ylabel("GFLOP/s")
        handles, labels = axes[0].get_legend_handles_labels()
        dtypes = len({row["dtype"] for row in rows})
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(labels) // dtypes,
            frameon=False,
            fontsize=8,
        )
        return png_bytes(figure)


def _roof(ax: Axes, rows: Sequence[Row]) -> None:
    bandwidth, rate = (float(np.median([row[key] for row in rows])) for key in LIMITS)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    x = np.geomspace(min(intensities) / 2, max(*intensities, rate / bandwidth) * 2, 200)
    ax.plot(x, np.minimum(x * bandwidth, rate) / 1e9, color=INK, linewidth=1.5)
    ax.annotate(
        f"{bandwidth / 1e9:.0f} GB/s read, {rate / 1e9:.0f} GFLOP/s sgemm",
        (0.02, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=9,
    )
    # By column of the legend, which fills downwards; the mean does none of this arithmetic.
    for name, (color, label) in STYLES.items():
        for dtype, marker in MARKERS.items() if name != "mean" else ():
            points = [r for r in rows if r["dtype"] == dtype and name in r["times"]]
            if points:
                ax.plot(
                    [row["flops"] / row["bytes"] for row in points],
                    [row["flops"] / row["times"][name]["median"] / 1e9 for row in points],
                    marker,
                    color=color,
                    markersize=7 if name == "fedrot" else 4.5,
                    label=f"{label}, {dtype}",
                )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(top=3 * rate / 1e9)
    _plain_numbers(ax)
    ax.set_xlabel("flops per byte of client factors")


def growth(sweeps: dict[str, Sequence[Row]]) -> bytes:
    """Time over the number of clients and over the rank, with the floor."""
    with themed_figure("light", len(sweeps), 5.2 * len(sweeps), 4.2) as (figure, axes):
        for ax, (sweep, rows) in zip(axes, sweeps.items(), strict=True):
            x = [row[sweep] for row in rows]
            for name in ("per_layer", "mean", "fedrot"):
                if name in rows[0]["times"]:
                    color, label = STYLES[name]
                    ms = [1000 * row["times"][name]["median"] for row in rows]
                    ax.plot(x, ms, "o-", markersize=3.5, color=color, label=label)
            ax.plot(x, [1000 * row["floor"] for row in rows], "--", color=INK, label="floor")
            ax.set_xscale("log", base=10 if sweep == "clients" else 2)
            ax.set_yscale("log")
            _plain_numbers(ax)
            ax.set_xlabel(sweep)
            first = rows[0]
            fixed = f"rank {first['rank']}" if sweep == "clients" else f"{first['clients']} clients"
            title = f"{first['layers']} layers of 1024 x 1024, {fixed}"
            ax.set_title(title, loc="left", fontsize=10)
        axes[0].set_ylabel("ms")
        axes[0].legend(frameon=False, fontsize=9)
        return png_bytes(figure)


def _plain_numbers(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
