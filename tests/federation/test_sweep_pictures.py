"""Pictures of a sweep: both accuracies, the numbers they show, and panels that compare."""

from __future__ import annotations

import statistics

import pytest
import yaml

from fedrot.report import plots
from fedrot.simulation.run_dir import RunDir
from fedrot.statistics import Difference, paired
from fedrot.sweep import plots as sweep_plots
from fedrot.sweep.analysis import Results
from fedrot.sweep.experiment import read_experiment
from fedrot.sweep.pages import write_results
from fedrot.sweep.runner import Outcome, Tuned

BOTH = {"clients.alpha": [0.3, 10.0], "local.personal_head": [False, True]}
LOCAL = "accuracy on the clients' own mix of labels"
ROUNDS = 3


def accuracy(cell, method, seed, done=ROUNDS):
    """Of cells that reach far apart, by the last round."""
    return (0.1 + 0.1 * cell + 0.03 * (1 + cell) * method * (1 + seed)) * (1 + done) / (1 + ROUNDS)


def score(has_local, *run):
    return {"accuracy": accuracy(*run)} | (
        {"accuracy_local": accuracy(*run) + 0.2} if has_local else {}
    )


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Writes the report of made-up runs; returns its pictures by name, and the page's text."""

    def draw(vary, local=lambda cell: True):
        path = tmp_path / "try.yaml"
        tree = {"title": "A try", "methods": ["fedit", "fedrot"], "vary": vary, "seeds": 2}
        tree["options"] = {"local.head": True}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        experiment = read_experiment(path)
        outcomes = []
        for c, cell in enumerate(experiment.cells):
            for m, variant in enumerate(experiment.methods):
                folders = [tmp_path / "runs" / f"{c}-{m}-{seed}" for seed in range(2)]
                summaries = []
                for seed, folder in enumerate(folders):
                    scores = [score(local(cell), c, m, seed, done) for done in range(ROUNDS + 1)]
                    error = {"aggregation_error": 3.0 - m, "aggregation_error_plain": 3.0 + c}
                    timed = {"seconds_aggregation": 0.1}
                    summaries.append({**scores[-1], **error, **timed, "start": scores[0]})
                    folder.mkdir(parents=True)
                    RunDir(folder).write_rows(
                        [{"round": i, **row} for i, row in enumerate(scores) if i]
                    )
                outcomes.append(Outcome(cell, variant, Tuned({}, []), summaries, folders))
        figures = []

        def png_bytes(figure):
            figures.append(figure)
            return str(len(figures) - 1).encode()

        for module in (plots, sweep_plots):
            monkeypatch.setattr(module, "png_bytes", png_bytes)
        out = tmp_path / "out"
        out.mkdir()
        write_results(Results(experiment, outcomes), out)
        named = {p.name: figures[int(p.read_bytes())] for p in out.glob("*.png")}
        return named, (out / "report.md").read_text()

    return draw


def values(cell, method, more):
    return [accuracy(cell, method, seed) + more for seed in range(2)]


def test_panels_show_both_accuracies_on_one_axis(drawn):
    pictures, text = drawn(BOTH)
    cells = [f"alpha {a}, personal_head {h}" for a in (0.3, 10.0) for h in (False, True)]
    words = {
        "accuracy.png": "test accuracy",
        "local-accuracy.png": LOCAL,
        "differences.png": "test accuracy, difference to FedIT",
        "local-differences.png": f"{LOCAL}, difference to FedIT",
        "error-ratio.png": "aggregation error / plain averaging",
    }
    for name, label in words.items():
        figure, methods = pictures[name], ["FedIT", "FedRot-LoRA"]
        assert figure.get_supxlabel() == label
        assert f"]({name})" in text
        assert [ax.get_title(loc="left") for ax in figure.axes] == cells
        first = figure.axes[0]
        for ax in figure.axes:
            assert ax.get_xlim() == first.get_xlim() and ax.get_ylim() == first.get_ylim()
            assert ax.yaxis.get_tick_params()["labelleft"] is (ax is first)
        shown = methods[1:] if "differences" in name else methods
        assert [t.get_text() for t in first.get_yticklabels()] == shown
        assert first.get_ylim() == (len(shown) - 0.5, -0.5)
    for name, more in (("accuracy.png", 0.0), ("local-accuracy.png", 0.2)):
        for cell, ax in enumerate(pictures[name].axes):
            means = [statistics.fmean(values(cell, method, more)) for method in (0, 1)]
            assert [bar.get_width() for bar in ax.patches] == pytest.approx(means)
    for name in ("differences.png", "local-differences.png"):
        for cell, ax in enumerate(pictures[name].axes):
            one, other = values(cell, 0, 0.0), values(cell, 1, 0.0)
            found = paired([b - a for a, b in zip(one, other, strict=True)])
            point, _, (interval,) = ax.containers[0].lines
            assert point.get_xdata() == pytest.approx([found.mean])
            (low, _), (high, _) = interval.get_segments()[0]
            assert (low, high) == pytest.approx((found.low, found.high))
            assert ax.get_xlim()[0] < low and high < ax.get_xlim()[1]


def test_both_accuracies_over_rounds(drawn):
    pictures, text = drawn(BOTH)
    for cell, folder in enumerate(
        f"alpha-{a}_personal_head-{h}" for a in (0.3, 10.0) for h in (False, True)
    ):
        for begin, label, more in (("", "test accuracy", 0.0), ("local-", LOCAL, 0.2)):
            name = f"{begin}rounds-{folder}.png"
            (ax,) = pictures[name].axes
            assert ax.get_ylabel() == label and ax.get_ylim() == (0, 1.02)
            assert f": {label} over rounds, " in text and f"]({name})" in text
            for method, line in enumerate(ax.lines):
                expected = [
                    statistics.fmean(accuracy(cell, method, seed, done) + more for seed in (0, 1))
                    for done in range(ROUNDS + 1)
                ]
                assert line.get_ydata() == pytest.approx(expected)


def test_both_accuracies_along_one_option(drawn):
    pictures, text = drawn({"clients.alpha": [0.3, 1.0, 10.0]})
    for name, label, more in (
        ("accuracy.png", "test accuracy", 0.0),
        ("local-accuracy.png", LOCAL, 0.2),
    ):
        (ax,) = pictures[name].axes
        assert ax.get_ylabel() == label
        assert f"![{label.capitalize()} along clients.alpha, mean" in text
        for method, line in enumerate(c.lines[0] for c in ax.containers):
            means = [statistics.fmean(values(cell, method, more)) for cell in range(3)]
            assert line.get_ydata() == pytest.approx(means)
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0.3", "1.0", "10.0"]


def test_without_local_tests_there_is_one_accuracy(drawn):
    pictures, text = drawn(BOTH, local=lambda cell: False)
    assert len(pictures) == 3 + 4 and not any(name.startswith("local-") for name in pictures)
    assert "own mix" not in text


def test_cells_without_local_tests_are_left_out(drawn):
    vary = {"clients.local_test": [False, True], "clients.alpha": [0.3, 10.0]}
    pictures, _ = drawn(vary, local=lambda cell: cell.options["clients.local_test"])
    assert [len(ax.patches) for ax in pictures["local-accuracy.png"].axes] == [0, 0, 2, 2]
    assert [len(ax.containers) for ax in pictures["local-differences.png"].axes] == [0, 0, 1, 1]
    assert sorted(name for name in pictures if name.startswith("local-rounds-")) == [
        "local-rounds-local_test-True_alpha-0.3.png",
        "local-rounds-local_test-True_alpha-10.0.png",
    ]


def test_a_long_label_stays_in_the_picture(monkeypatch):
    monkeypatch.setattr(sweep_plots, "png_bytes", lambda figure: figure)
    label = f"{LOCAL}, difference to FedRot-LoRA align=joint lam=1.0"
    figure = sweep_plots.differences({"all": {"FedIT": Difference(0.1, 0.0, 0.2, 3)}}, label)
    figure.canvas.draw()
    (text,) = figure.texts
    assert text.get_text().split() == label.split()
    box, (ax,) = text.get_window_extent(), figure.axes
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 < ax.get_tightbbox().y0


def test_only_certain_differences_are_colored(monkeypatch, drawn):
    """As in tables and pages, where two seeds are too few to tell."""
    monkeypatch.setattr(sweep_plots, "png_bytes", lambda figure: figure)
    rows = {
        "above": Difference(0.2, 0.1, 0.3, 3),
        "two seeds": Difference(0.2, 0.2, 0.2, 2),
        "below": Difference(-0.2, -0.3, -0.1, 10),
        "none": None,
        "unsure": Difference(0.2, -0.1, 0.5, 10),
    }
    (ax,) = sweep_plots.differences({"all": rows}, "difference").axes
    colors = [container.lines[0].get_color() for container in ax.containers]
    above, below = (plots.look(index)["color"] for index in (1, 3))
    assert colors == [above, plots.PLAIN, below, plots.PLAIN]
    _, text = drawn(BOTH)
    assert "grey where they hold 0 or two seeds are too few to tell" in text


def test_long_titles_of_panels_do_not_touch(monkeypatch):
    monkeypatch.setattr(plots, "png_bytes", lambda figure: figure)
    cells = [
        "alpha 0.1, personal_head False, optimizer adam, lr 0.01",
        "alpha 100.0, personal_head False, optimizer sgd, lr 0.3",
        f"column {'a-very-long-name-' * 12}",
    ]
    figure = plots.bars({cell: {"FedIT": (0.9, 0.1)} for cell in cells}, "accuracy", ".3f")
    figure.canvas.draw()
    titles = [ax._left_title for ax in figure.axes]
    for title, cell in zip(titles[:2], cells, strict=False):
        assert title.get_text().split() == cell.split()
    assert titles[2].get_text().endswith("…")
    boxes = [title.get_window_extent() for title in titles]
    for left, right in zip(boxes, [*boxes[1:], None], strict=True):
        assert left.x1 < (right.x0 if right else figure.bbox.x1)
        assert left.y1 <= figure.bbox.y1
