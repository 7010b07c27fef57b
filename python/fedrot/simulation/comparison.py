"""Several methods in several settings over the same seeds."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.config import Config, load
from fedrot.errors import FedrotError
from fedrot.files import write_json
from fedrot.methods import METHODS
from fedrot.options import Tree, flatten, merge, parse_overrides, pick, read_yaml
from fedrot.progress import Track, no_progress
from fedrot.results import MEANS, Comparison, Group, clients_alone
from fedrot.simulation.rounds import federate
from fedrot.simulation.run_dir import RunDir
from fedrot.statistics import mean_std


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method to compare: its label, its folder's name, and its options under ``method:``."""

    label: str
    folder: str
    options: Tree


def parse_variant(text: str) -> Variant:
    """``"fedit"``, or with options of its own ``"fedrot:lam=0.5:align=A"``."""
    name, *options = text.split(":")
    kind = pick(METHODS, name, "method")
    own = parse_overrides(options)
    label = " ".join([kind.name, *options])
    return Variant(label, "-".join([name, *options]).replace("=", "-"), {"name": name, **own})


def compare(
    variants: Sequence[Variant],
    settings: Sequence[str],
    seeds: Sequence[int],
    options: Tree,
    path: Path,
    *,
    resume: bool = False,
    force: bool = False,
    log: Sequence[str] = (),
    track: Track = no_progress,
) -> Comparison:
    """Run everything into ``path/<setting>/<method>/seed-<n>`` and write summary and report.

    All methods see the same data, start and batches of a seed. Where a setting trains once
    (one-shot) the first method's uploads serve the others.

    Raises:
        FedrotError: an option is wrong (found before anything runs), or as :func:`federate`.
    """
    # Here, as matplotlib takes a second to import, which the processes of a sweep save.
    from fedrot.report.pages import write_comparison_report

    _check(variants, settings, options)
    plan = [
        (setting, variant, _configs(options, variant, setting, seeds))
        for setting in settings
        for variant in variants
    ]
    groups: list[Group] = []
    for setting, variant, configs in track(plan, "settings and methods"):
        first = not any(g.setting == setting for g in groups)
        folder = path / setting
        runs = [RunDir(folder / variant.folder / f"seed-{c.seed}") for c in configs]
        summaries = []
        for config, run in track(list(zip(configs, runs, strict=True)), "seeds"):
            shared = config.start == "own" and not first
            source = folder / variants[0].folder / f"seed-{config.seed}" if shared else None
            summaries.append(
                federate(
                    config,
                    run.path,
                    resume=resume,
                    force=force,
                    uploads_from=source,
                    log=log,
                    track=track,
                )
            )
        curves = [
            [s["start"]["accuracy"], *(row["accuracy"] for row in run.rows())]
            for s, run in zip(summaries, runs, strict=True)
        ]
        groups.append(Group(setting, variant.label, summaries, curves, [run.path for run in runs]))
    groups = _with_clients_alone(groups)
    labels = [variant.label for variant in variants]
    result = Comparison(plan[0][2][0].task.title, list(seeds), list(settings), labels, groups)
    write_comparison_report(path, result, merge_command(result))
    write_json(path / "summary.json", _summary(result))
    return result


def merge_command(result: Comparison, program: str = "fedrot") -> str | None:
    """The line that merges the clients of the last one-shot run once more, from the folders."""
    for group in reversed(result.groups):
        if group.folders and RunDir(group.folders[0]).clients():
            path = group.folders[0]
            config = read_yaml(path / "config.yaml")
            options = _aggregate_options(config["method"], head=config["local"]["head"])
            if config["start"] == "own" and config["clients"]["weights"] == "uniform" and options:
                folder = shlex.quote(str(path))
                return f"{program} aggregate {folder}/clients/client-* {options} -o {folder}/merged"
    return None


def _aggregate_options(method: Tree, head: bool) -> str | None:
    """The options of ``fedrot aggregate`` that do what a method does in a single merge."""
    name = method["name"]
    if name == "fedit":
        return "--lam 0.0"
    if name == "flexlora" and method["gauge"] == "reference" and method["energy"] is None:
        return "--rule exact"
    if name == "robust" and method["rule"] == "clip" and head:
        return None  # here heads are clipped around the untrained one
    turn, rule = f"--lam {method.get('lam')}", ""
    if name == "robust":
        count = method["attackers"]
        rule = f" --rule {method['rule']}{'' if count is None else f' --attackers {count}'}"
        rule += f" --bound {method['bound']}" if method["bound"] else ""
    elif name == "fedrot" and method["rotation"] in ("procrustes", "shifted"):
        if method["align"] == "alternate":  # its first round is plain
            return "--lam 0.0"
        if method["rotation"] == "shifted":
            turn = f"--rotation shifted --eps {method['eps']}"
    else:
        return None
    align = "" if method["align"] == "joint" else f" --align {method['align']}"
    proper = f" --{'proper' if method['proper'] else 'improper'}"
    default = method["proper"] is (name == "fedrot")
    return f"{turn}{rule}{align}{'' if default else proper}"


def _check(variants: Sequence[Variant], settings: Sequence[str], options: Tree) -> None:
    for what, values in (
        ("methods", [variant.label for variant in variants]),
        ("settings", list(settings)),
    ):
        if not values:
            raise FedrotError(f"--{what} must name at least one")
        if twice := next((v for v in values if values.count(v) > 1), None):
            raise FedrotError(f"--{what} names {twice} twice")
    for key, place in (
        ("seed", "--seeds"),
        ("setting", "--settings"),
        ("method.name", "--methods"),
    ):
        if key in flatten(options):
            raise FedrotError(f"{key} is set by the comparison itself ({place})")
    common = options.get("method", {})
    for key in flatten({"method": common}):
        option = key.removeprefix("method.")
        if not any(has_option(v, option, common) for v in variants):
            raise FedrotError(f"none of the compared methods has the option {key!r}")


def _configs(options: Tree, variant: Variant, setting: str, seeds: Sequence[int]) -> list[Config]:
    try:
        return [configure(options, variant, {"setting": setting, "seed": seed}) for seed in seeds]
    except FedrotError as error:
        raise FedrotError(f"{error} ({variant.label} in the setting {setting})") from error


def has_option(variant: Variant, option: str, common: Any = None) -> bool:
    """Whether the method has an option of that name, and use for it beside its own options and
    the ``common`` ones of all methods."""
    given = merge({"method": common}, {"method": variant.options})["method"]
    return option in METHODS[variant.options["name"]].takes(given)


def configure(options: Tree, variant: Variant, *later: Tree) -> Config:
    """The configuration of one run of a variant. Common method options reach the methods that
    have them; a variant's own options win, and ``later`` ones over all."""
    common = options.get("method", {})
    common = {key: value for key, value in common.items() if has_option(variant, key, common)}
    rest = {key: value for key, value in options.items() if key != "method"}
    return load(rest, {"method": merge(common, variant.options)}, *later)


def _with_clients_alone(groups: Sequence[Group]) -> list[Group]:
    """Per setting a last line with the mean single client, where clients were evaluated."""
    out: list[Group] = []
    for setting in dict.fromkeys(group.setting for group in groups):
        mine = [group for group in groups if group.setting == setting]
        alone = clients_alone(mine[0])
        out += [*mine, *([alone] if alone else [])]
    return out


def _summary(result: Comparison) -> dict[str, Any]:
    """What ``summary.json`` holds: mean, std and values of every group."""
    rows = []
    for group in result.groups:
        row: dict[str, Any] = {"setting": group.setting, "synthetic": group.synthetic}
        row["method"] = group.method
        for key in ("accuracy", *(key for key, _, _ in MEANS)):
            if (found := mean_std(group.values(key))) is not None:
                row[key] = {"mean": found[0], "std": found[1], "values": group.values(key)}
        if (difference := mean_std(result.differences(group))) is not None:
            row["accuracy_difference"] = {"mean": difference[0], "std": difference[1]}
        rows.append({**row, "runs": [str(folder) for folder in group.folders]})
    return {"task": result.task, "seeds": list(result.seeds), "groups": rows}
