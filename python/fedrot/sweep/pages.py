"""The files of an experiment: ``report.html``, ``report.md``, ``results.json``, pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

from fedrot.files import write_bytes, write_json, write_text
from fedrot.report import html, markdown
from fedrot.report.html import Pictures
from fedrot.report.plots import bars, mean_curves
from fedrot.statistics import plus_minus
from fedrot.sweep import plots
from fedrot.sweep.analysis import Results
from fedrot.sweep.experiment import Cell, short_names

Table = tuple[str, list[str], list[list[str]]]  # heading, header, rows
Format = Callable[[Results, Cell, str], str]

LOCAL = "accuracy_local"
Measure = tuple[str, str, str]  # how its pictures' names begin, its key, words
MEASURES: tuple[Measure, ...] = (
    ("", "accuracy", "test accuracy"),
    ("local-", LOCAL, "accuracy on the clients' own mix of labels"),
)
WORDS = (
    "Accuracy: mean ± sample standard deviation over seeds, on test examples that no tuning has "
    "seen. Difference: against the first method, paired by seed, with its 95 % t-interval; * where "
    "that excludes 0 with more than two seeds (each interval on its own: one in twenty does so by "
    "chance). Error: Frobenius norm of (weighted mean of B_i A_i) - B A, mean over rounds, along "
    "each method's own trajectory; error ratio: the same relative to plain averaging of the same "
    "uploads."
)


def write_results(results: Results, out: Path) -> list[Path]:
    """Write everything into ``out``; returns the files, the page last."""
    pictures = html.drawn_once(_pictures(results))
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a value is a $
        for name, (picture, _) in pictures.items():
            write_bytes(out / name, picture(theme="light"))
        page = _page(results, pictures)
    write_json(out / "results.json", results.as_tree())
    write_text(out / "report.md", _markdown(results, pictures))
    write_text(out / "report.html", page)
    names = [*pictures, "results.json", "report.md", "report.html"]
    return [out / name for name in names]


def accuracies(results: Results) -> list[Table]:
    """Accuracy and differences, on local tests too where there are some."""
    first = results.methods[0]
    found: list[tuple[str, Format]] = [
        ("Accuracy", _accuracy),
        (f"Difference to {first}", _difference),
    ]
    if len(_measures(results)) > 1:
        found += [
            ("Accuracy on the clients' own mix of labels", partial(_accuracy, key=LOCAL)),
            (f"The same, difference to {first}", partial(_difference, key=LOCAL)),
        ]
    return [_by_method(results, heading, form) for heading, form in found]


def tables(results: Results) -> list[Table]:
    """Those of accuracy, aggregation error, and what was tuned."""
    found = [("Aggregation error", _error), ("Seconds of aggregation", _seconds)]
    out = accuracies(results) + [_by_method(results, heading, form) for heading, form in found]
    if results.experiment.tune:
        first = results.experiment.methods[0]
        runs = len(results.experiment.trials(first)) * results.experiment.trial_seeds(first)
        heading = f"Tuned options ({runs} runs a method and cell)"
        out.append(_by_method(results, heading, _tuned))
    return out


def _measures(results: Results) -> list[Measure]:
    """Of accuracy, without local tests the one alone."""
    local = any(results.values(o.cell, o.variant.label, LOCAL) for o in results.outcomes)
    return [m for m in MEASURES if local or m[1] != LOCAL]


def failures(results: Results) -> list[str]:
    """A sentence for each method and cell with runs that diverged."""
    out = []
    for o in results.outcomes:
        if not o.complete:
            count = sum(s is None for s in o.summaries)
            where = f" ({o.cell.label})" if o.cell.options else ""
            out.append(
                f"{o.variant.label}{where}: {count} of {len(o.summaries)} runs diverged and are "
                "left out."
            )
    return out


def _by_method(results: Results, heading: str, form: Format) -> Table:
    header = ["method", *(cell.label or "all" for cell in results.cells)]
    rows = [
        [method, *(form(results, cell, method) for cell in results.cells)]
        for method in results.methods
    ]
    return heading, header, rows


def _accuracy(results: Results, cell: Cell, method: str, key: str = "accuracy") -> str:
    return plus_minus(results.spread(cell, method, key), ".3f")


def _difference(results: Results, cell: Cell, method: str, key: str = "accuracy") -> str:
    found = results.difference(cell, method, key)
    if found is None:
        return "-"
    star = " *" if found.certain else ""
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}){star}"


def _error(results: Results, cell: Cell, method: str) -> str:
    error = results.spread(cell, method, "aggregation_error")
    ratio = results.spread(cell, method, "error_ratio")
    if error is None:
        return "-"
    beside = "" if ratio is None else f" (ratio {plus_minus(ratio, '.2f')})"
    return f"{error[0]:.3g}{beside}"


def _seconds(results: Results, cell: Cell, method: str) -> str:
    return plus_minus(results.spread(cell, method, "seconds_aggregation"), ".3f")


def _tuned(results: Results, cell: Cell, method: str) -> str:
    tuned = results.of(cell, method).tuned
    names = short_names(results.experiment.tune)
    chosen = ", ".join(
        f"{names[k]} {v:g}" if isinstance(v, float) else f"{names[k]} {v}"
        for k, v in tuned.options.items()
    )
    score = next((score for options, score in tuned.scores if options is tuned.options), None)
    return f"{chosen} ({score:.3f})" if score is not None else chosen or "-"


def _lead(results: Results) -> str:
    experiment = results.experiment
    return f"{len(experiment.methods)} methods, {experiment.seeds} seeds."


def _page(results: Results, pictures: Pictures) -> str:
    experiment = results.experiment
    parts = [html.paragraph(f"Claim: {experiment.claim}")] if experiment.claim else []
    parts += [html.note(text) for text in failures(results)]
    for heading, header, rows in tables(results):
        parts += [html.heading(heading), html.table(header, rows, words=1)]
    parts += [html.paragraph(WORDS), html.heading("Pictures")]
    parts += [html.figure(picture, caption) for picture, caption in pictures.values()]
    return html.page(experiment.title, _lead(results), *parts)


def _markdown(results: Results, pictures: Pictures) -> str:
    experiment = results.experiment
    lines = [f"# {experiment.title}", "", _lead(results), ""]
    if experiment.claim:
        lines += [f"Claim: {experiment.claim}", ""]
    lines += [f"- {text}" for text in failures(results)]
    for heading, header, rows in tables(results):
        lines += [f"## {heading}", "", markdown.table(header, rows)]
    lines += [WORDS, ""]
    for name, (_, caption) in pictures.items():
        lines += [f"![{caption}]({name})", ""]
    return "\n".join(lines)


def _pictures(results: Results) -> Pictures:
    out: Pictures = {}
    measures, methods = _measures(results), results.methods
    labels = {cell.label or "all": cell for cell in results.cells}
    for measure in measures:
        out |= _accuracy_pictures(results, labels, measure)
    ratios = {
        label: {m: results.spread(cell, m, "error_ratio") for m in methods}
        for label, cell in labels.items()
    }
    out["error-ratio.png"] = (
        partial(bars, ratios, "aggregation error / plain averaging", ".2f", line=1.0),
        "Aggregation error relative to plain averaging of the same uploads.",
    )
    for label, cell in labels.items():
        for begin, key, words in measures:
            curves = {m: results.curves(cell, m, key) for m in methods}
            lengths = [len(seed) for seeds in curves.values() for seed in seeds]
            if min(lengths, default=0) > 2:
                out[f"{begin}rounds-{cell.folder}.png"] = (
                    partial(mean_curves, curves, plots.shortened(label), words),
                    f"{label}: {words} over rounds, mean and standard deviation over seeds.",
                )
    return out


def _accuracy_pictures(results: Results, labels: dict[str, Cell], measure: Measure) -> Pictures:
    """One accuracy after the last round, and its differences to the first method."""
    out: Pictures = {}
    begin, key, words = measure
    methods = results.methods
    if len(results.experiment.vary) == 1 and len(labels) > 1:
        (axis,) = results.experiment.vary
        texts = results.experiment.texts(axis)
        lines = {m: [results.spread(cell, m, key) for cell in labels.values()] for m in methods}
        out[f"{begin}accuracy.png"] = (
            partial(plots.over_axis, axis, texts, lines, words),
            f"{words.capitalize()} along {axis}, mean and standard deviation over seeds.",
        )
    else:
        panels = {
            label: {m: results.spread(cell, m, key) for m in methods}
            for label, cell in labels.items()
        }
        out[f"{begin}accuracy.png"] = (
            partial(bars, panels, words, ".3f"),
            f"{words.capitalize()}, mean and standard deviation over seeds.",
        )
    if len(methods) > 1 and results.experiment.seeds > 1:
        found = {
            label: {m: results.difference(cell, m, key) for m in methods[1:]}
            for label, cell in labels.items()
        }
        out[f"{begin}differences.png"] = (
            partial(plots.differences, found, f"{words}, difference to {methods[0]}"),
            f"{words.capitalize()}, difference to {methods[0]}, paired by seed, with 95 % "
            "intervals; grey where they hold 0 or two seeds are too few to tell.",
        )
    return out
