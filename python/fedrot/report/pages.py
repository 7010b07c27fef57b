"""What goes into a run's folder and into a comparison's besides numbers: pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedrot.config import SETTINGS, Config
from fedrot.files import write_bytes, write_text
from fedrot.report import html, plots
from fedrot.report.html import Pictures
from fedrot.results import MEANS, Comparison
from fedrot.statistics import MeanStd, mean_std, paired, plus_minus

Row = Mapping[str, Any]  # a line of metrics.jsonl

COLUMNS = {
    "round": ("round", "d"),
    "accuracy": ("accuracy", ".3f"),
    "accuracy_averaged": ("of the average", ".3f"),
    "accuracy_local": ("local", ".3f"),
    "loss": ("test loss", ".3f"),
    "train_loss": ("train loss", ".3f"),
    "aggregation_error": ("error", ".3g"),
    "aggregation_error_plain": ("plain", ".3g"),
    "rotation_angle": ("angle", ".1f"),
    "rank": ("rank", ".1f"),
    "energy": ("energy", ".4f"),
    "seconds_local": ("local, s", ".2f"),
    "seconds_aggregation": ("aggr., s", ".4f"),
}
WORDS = (
    "Error: aggregation error of the round's uploads, the Frobenius norm of (mean of B_i A_i) - "
    "B A over all layers; plain: the same uploads averaged factor by factor. Angle: mean "
    "principal angle in degrees of the rotation that best aligns a client with the reference. "
    "Where clients keep a part of the model, accuracy is the mean over their models. Local: on "
    "test examples with each client's own mix of labels."
)


def write_run_report(
    path: Path, config: Config, summary: Mapping[str, Any], rows: Sequence[Row]
) -> None:
    """Pictures and ``report.html`` of one run."""
    method = config.method.name
    pictures = html.drawn_once(_run_pictures(config, summary, rows))
    _save(path, pictures)
    facts = [
        ("method", method),
        ("final test accuracy", f"{summary['accuracy']:.3f}"),
        ("before adaptation", f"{summary['start']['accuracy']:.3f}"),
        *_client_fact(summary),
        ("test examples", str(summary["test_examples"])),
        ("examples per client", ", ".join(map(str, summary["client_examples"]))),
        ("local training", f"{summary['seconds_local']:.1f} s"),
        ("aggregation", f"{summary['seconds_aggregation']:.3f} s"),
    ]
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    cells = [[format(row[key], form) for key, (_, form) in columns.items()] for row in rows]
    text = html.page(
        _title(config),
        f"{config.task.title}; {config.clients.count} clients, {config.rounds} "
        f"round{_s(config.rounds)}.",
        *_about(config.setting, config.synthetic),
        html.table([], facts),
        html.heading("Pictures"),
        *(html.figure(picture, caption) for picture, caption in pictures.values()),
        html.heading("Rounds"),
        html.table([name for name, _ in columns.values()], cells, words=1),
        html.paragraph(WORDS),
        *_ranks(summary),
        html.heading("Configuration"),
        html.code(yaml.safe_dump(config.tree(), sort_keys=False)),
    )
    write_text(path / "report.html", text)


def write_comparison_report(path: Path, comparison: Comparison, merge_command: str | None) -> None:
    """Pictures and ``report.html`` of a comparison."""
    pictures = html.drawn_once(_comparison_pictures(comparison))
    _save(path, pictures)
    seeds = len(comparison.seeds)
    parts = [
        html.table(*comparison_table(comparison), words=2),
        *(html.paragraph(text) for text in findings(comparison)),
        html.paragraph(
            f"Accuracy: mean and sample standard deviation over {seeds} seed{_s(seeds)}; all "
            "methods see the same data, start and batches of a seed. Difference: paired by seed, "
            "against the first method. Error (aggregation error), plain (the same uploads "
            "averaged factor by factor), angle (degrees) and rank (of methods that choose it, mean "
            "of the layers): means over seeds and rounds."
        ),
        html.heading("Settings"),
        *(
            text
            for name in comparison.settings
            for text in _about(name, comparison.of(name)[0].synthetic, f"{name}: ")
        ),
        html.heading("Pictures"),
        *(html.figure(picture, caption) for picture, caption in pictures.values()),
        html.paragraph(WORDS),
        html.heading("Runs"),
        html.table(["setting", "method", "seed", "accuracy", "folder"], _runs(comparison)),
    ]
    if merge_command:
        parts += [
            html.heading("Next"),
            html.paragraph("The clients' adapters of the one-shot runs are PEFT folders:"),
            html.code(merge_command),
        ]
    title = "Comparison: " + ", ".join(comparison.methods)
    lead = f"{comparison.task}; {seeds} seed{_s(seeds)}."
    write_text(path / "report.html", html.page(title, lead, *parts))


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, for the page and for the terminal."""
    shown = [mean for mean in MEANS if any(g.values(mean[0]) for g in comparison.groups)]
    header = ["setting", "method", "accuracy", "difference", *(name for _, name, _ in shown)]
    rows = []
    for group in comparison.groups:
        accuracy = plus_minus(mean_std(group.values("accuracy")), ".3f")
        difference = plus_minus(mean_std(comparison.differences(group)), "+.3f")
        means = [_mean(mean_std(group.values(key)), form) for key, _, form in shown]
        rows.append([group.label, group.method, accuracy, difference, *means])
    return header, rows


def findings(comparison: Comparison) -> list[str]:
    """A sentence per method and setting: is the paired difference more than noise?"""
    out = []
    for group in comparison.groups:
        found = paired(comparison.differences(group))
        if found is None:
            continue
        baseline = comparison.of(group.setting)[0]
        verdict = "a difference" if found.certain else "no difference beyond noise"
        if not found.enough:
            verdict = "too few seeds to tell"
        out.append(
            f"{group.label}: {group.method} against {baseline.method}: {verdict} "
            f"(95 % paired t-interval {found.low:+.3f} to {found.high:+.3f}, {found.pairs} seeds)."
        )
    return out


def _mean(values: MeanStd | None, form: str) -> str:
    if values is None:
        return "-"
    text = format(values[0], form)
    return f"{values[0]:.0e}" if values[0] and not float(text) else text  # small, and not none


def _about(setting: str, synthetic: bool, prefix: str = "") -> list[str]:
    """What a setting does, and a note where the mismatch between clients is planted."""
    own = html.paragraph(prefix + SETTINGS[setting].text) if setting != "regauge" else ""
    return [own, html.note(prefix + SETTINGS["regauge"].text) if synthetic else ""]


def _title(config: Config) -> str:
    synthetic = " (synthetic)" if config.synthetic else ""
    bad = config.clients.attackers
    attackers = f", {bad} attacker{_s(bad)} ({config.clients.attack})" if bad else ""
    return (
        f"{config.method.name}, setting {config.setting}{synthetic}{attackers}, seed {config.seed}"
    )


def _s(count: int) -> str:
    return "s" if count != 1 else ""


def _client_fact(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "client_accuracy" not in summary:
        return []
    return [("one client alone, mean", f"{summary['client_accuracy']:.3f}")]


def _ranks(summary: Mapping[str, Any]) -> list[str]:
    """The ranks that the method chose, where it did."""
    if "ranks" not in summary:
        words = "Rank: mean over the clients of what is left when they have pruned themselves."
        return [html.paragraph(words)] if "rank" in summary else []
    cells = [[module, str(rank)] for module, rank in summary["ranks"].items()]
    return [
        html.paragraph(
            "Rank: mean over the layers of what the method chose. Energy: the share of the squared "
            "singular values of the mean of B_i A_i that these ranks keep, over all layers."
        ),
        html.heading("Ranks after the last round"),
        html.table(["layer", "rank"], cells, words=1),
    ]


def _run_pictures(config: Config, summary: Mapping[str, Any], rows: Sequence[Row]) -> Pictures:
    method, last, title = config.method.name, rows[-1], _title(config)
    if config.start == "own":
        errors: dict[str, MeanStd | None] = {
            plots.PLAIN_AVERAGING: (last["aggregation_error_plain"], None),
            method: (last["aggregation_error"], None),
        }
        return {
            "accuracy.png": (
                partial(plots.client_accuracies, last, method, title),
                "Test accuracy of every client's own adapter and of the merged one.",
            ),
            "alignment.png": (
                partial(plots.bars, {title: errors}, "aggregation error", ".3g"),
                "Aggregation error of the merge.",
            ),
        }
    start = summary["start"]["accuracy"]
    pictures: Pictures = {
        "accuracy.png": (
            partial(plots.accuracy_over_rounds, rows, start, title),
            "Test accuracy, mean over the clients' own models."
            if "accuracy_averaged" in last
            else "Test accuracy of the global model.",
        ),
        "alignment.png": (
            partial(plots.alignment_over_rounds, rows, method, title),
            "Aggregation error of the same uploads by the method and by plain averaging, and how "
            "far clients are turned away from the reference.",
        ),
    }
    if "ranks" in last:
        pictures["ranks.png"] = (
            partial(plots.ranks_over_rounds, rows, config.lora.r, title),
            "Rank of every layer (thin), their mean (thick) and the largest possible (dashed).",
        )
    return pictures


def _comparison_pictures(comparison: Comparison) -> Pictures:
    out: Pictures = {}
    for name in comparison.settings:
        curves = {g.method: g.curves for g in comparison.of(name) if g.curves}
        if all(len(seed) > 2 for seeds in curves.values() for seed in seeds):
            out[f"accuracy-{name}.png"] = (
                partial(plots.mean_curves, curves, comparison.label(name)),
                f"Setting {comparison.label(name)}: test accuracy, mean and std over seeds.",
            )
    out["final-accuracy.png"] = (
        partial(plots.bars, comparison.spreads("accuracy"), "final test accuracy", ".3f"),
        "Final test accuracy, mean and std over seeds.",
    )
    last, plain = comparison.methods[-1], comparison.spreads("aggregation_error_plain")
    errors = {
        label: {
            plots.PLAIN_AVERAGING: plain[label][last],
            **{m: own[m] for m in comparison.methods},
        }
        for label, own in comparison.spreads("aggregation_error").items()
    }
    out["aggregation-error.png"] = (
        partial(plots.bars, errors, "aggregation error", ".3g", alike=False),
        "Aggregation error, mean over rounds: every method on the uploads of its own runs, and "
        f"plain averaging on the uploads of {last}.",
    )
    return out


def _runs(comparison: Comparison) -> list[list[str]]:
    return [
        [group.setting, group.method, str(s["seed"]), f"{s['accuracy']:.3f}", str(folder)]
        for group in comparison.groups
        for s, folder in zip(group.summaries, group.folders, strict=False)  # none: clients alone
    ]


def _save(path: Path, pictures: Pictures) -> None:
    for name, (picture, _) in pictures.items():
        write_bytes(path / name, picture(theme="light"))
