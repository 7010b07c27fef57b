"""Pictures of many methods: told apart, one drawn alike everywhere, names and numbers readable."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from fedrot.report import plots
from fedrot.report.pages import write_comparison_report
from fedrot.results import Comparison, Group
from fedrot.sweep.plots import over_axis

LONG = "Robust FedRot-LoRA rule=trimmed attackers=1 align=A proper=true"
METHODS = ["FedIT", LONG, *(f"M{i}" for i in range(10))]


@pytest.fixture
def figures(monkeypatch):
    """The figures of all pictures that are drawn, in order."""
    found = []

    def png_bytes(figure):
        found.append(figure)
        return str(len(found) - 1).encode()

    for module in ("fedrot.report.plots", "fedrot.sweep.plots"):
        monkeypatch.setattr(f"{module}.png_bytes", png_bytes)
    return found


def look(line):
    return to_hex(line.get_color()), line.get_linestyle(), line.get_marker()


def test_twelve_methods_differ_in_color_and_line_and_in_marker():
    looks = [plots.look(index) for index in range(12)]
    assert len({(x["color"], x["linestyle"]) for x in looks}) == 12
    assert len({x["marker"] for x in looks}) == 12
    for a, b in itertools.pairwise(looks):
        assert a["linestyle"] != b["linestyle"] and a["color"] != b["color"]


def test_a_method_looks_the_same_in_every_picture(figures):
    """Also where another one before it has no runs."""
    values = [*range(len(METHODS))]
    plots.mean_curves({m: [[0.1, 0.2, 0.3]] if i != 1 else [] for i, m in enumerate(METHODS)}, "t")
    over_axis("a", ["1", "2"], {m: [(0.1, 0.0), (0.2, 0.0)] for m in METHODS}, "accuracy")
    means = {name: (1.0, 0.1) for name in (plots.PLAIN_AVERAGING, *METHODS)}
    plots.bars({"t": means}, "error", ".2f")
    (curves,), (axis,), (bars,) = (figure.axes for figure in figures)
    named = {line.get_label(): look(line) for line in curves.lines}
    assert list(named) == [METHODS[i] for i in values if i != 1]
    for i, errorbar in enumerate(axis.containers):
        assert errorbar.get_label() == METHODS[i]
        assert i == 1 or look(errorbar.lines[0]) == named[METHODS[i]]
    grey, *colors = (to_hex(bar.get_facecolor()) for bar in bars.patches)
    assert grey == plots.PLAIN
    assert colors == [plots.look(i)["color"] for i in values]


def comparison(settings):
    def group(setting, method, scale):
        keys = {"accuracy": 0.98, "aggregation_error": 3.25e-7, "aggregation_error_plain": 3.25e2}
        summaries = [
            {"seed": s, **{key: x * scale * (1 + 0.02 * s) for key, x in keys.items()}}
            for s in range(2)
        ]
        return Group(setting, method, summaries, [[0.1, 0.2, 0.3]] * 2, [Path("a"), Path("b")])

    groups = [group(s, m, 1 - i / 20) for s in settings for i, m in enumerate(METHODS)]
    return Comparison("task", [0, 1], settings, METHODS, groups)


@pytest.mark.parametrize("settings", [["rounds"], ["rounds", "regauge", "one-shot"]])
def test_names_and_numbers_of_a_comparison_are_whole_and_apart(tmp_path, figures, settings):
    write_comparison_report(tmp_path, comparison(settings), None)
    for name in ("final-accuracy.png", "aggregation-error.png"):
        figure = figures[int((tmp_path / name).read_bytes())]
        figure.canvas.draw()
        first = figure.axes[0]
        texts = [*figure.texts, *first.get_yticklabels()]
        for ax in figure.axes:
            ticks = (
                tick for tick in ax.get_xticklabels() if tick.get_position()[0] < ax.get_xlim()[1]
            )
            texts += [ax._left_title, *ax.texts, *ticks]
        shown = {" ".join(text.get_text().split()) for text in first.get_yticklabels()}
        assert shown == {*METHODS} | ({plots.PLAIN_AVERAGING} if "error" in name else set())
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)


def test_curves_of_different_lengths():
    """Where the number of rounds was tuned, methods may have chosen others."""
    picture = plots.mean_curves({"a": [[0.1, 0.2]], "b": [[0.1, 0.2, 0.3], [0.2, 0.2, 0.2]]}, "t")
    assert picture.startswith(b"\x89PNG")


def test_the_legend_of_curves_covers_none_of_them(figures):
    plots.mean_curves({method: [[0.9, 0.95, 1.0]] for method in METHODS}, "t")
    (figure,) = figures
    figure.canvas.draw()
    shown = [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]
    assert shown == METHODS
    box, (ax,) = figure.legends[0].get_window_extent(), figure.axes
    assert ax.get_window_extent().x1 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
