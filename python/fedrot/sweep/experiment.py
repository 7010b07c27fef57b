"""An experiment, from its YAML file to the configurations of all its runs.

    title: Number of clients
    claim: What the paper says, with the number of the table or figure.
    options: {rounds: 12, clients.alpha: 0.5}     # of every run, as in a configuration file
    vary: {clients.count: [3, 10, 50]}            # a cell for each value (or combination); a value
                                                  # may be several options: {local.lr: 0.1, ...}
    methods: [fedit, flexlora, "fedrot:align=A"]  # the first one is the baseline
    tune: {local.lr: [0.1, 0.3, 1.0], method.lam: [0.4, 1.0]}
    tune_seeds: 2
    seeds: 10

Every method is tuned on the same values, with the same number of runs in every cell. Where a
method lacks an axis of ``tune`` (FedIT has no ``lam``), or fixes it itself, the runs that it would
have had there go to more validation seeds for each of its trials: a finer grid of learning rates
has decided comparisons by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedrot.config import Config
from fedrot.errors import FedrotError
from fedrot.options import Tree, flatten, joined, load_yaml, merge, nested
from fedrot.simulation.comparison import Variant, configure, has_option, parse_variant

TUNE_SEED = 10_000  # seeds of the tuning runs begin here, apart from those of the results
VALIDATION = 0.2  # of the training examples, while tuning

SHAPES: dict[str, tuple[type, str]] = {
    "title": (str, "text"),
    "claim": (str, "text"),
    "options": (dict, "keys and values, as {rounds: 12}"),
    "vary": (dict, "keys and lists of values, as {clients.count: [3, 10]}"),
    "methods": (list, "a list of methods, as [fedit, fedrot]"),
    "tune": (dict, "keys and lists of values, as {local.lr: [0.1, 1.0]}"),
}
LEAST = {"seeds": 1, "tune_seeds": 1, "first_seed": 0}


@dataclass(frozen=True)
class Cell:
    """One condition: the varied options, their name in tables, and that of the runs' folder."""

    options: Mapping[str, Any]  # by dotted key, or by any name a mapping of several options
    label: str
    folder: str

    @property
    def tree(self) -> Tree:
        several = (v if isinstance(v, dict) else {key: v} for key, v in self.options.items())
        return merge(*(nested(k, v) for options in several for k, v in options.items()))


@dataclass(frozen=True)
class Experiment:
    """See the head of this module."""

    name: str
    title: str
    methods: Sequence[Variant]
    claim: str = ""
    options: Tree = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_seeds: int = 2
    seeds: int = 10
    first_seed: int = 0

    @property
    def cells(self) -> list[Cell]:
        """Every combination of the varied values."""
        combinations = itertools.product(*self.vary.values())
        names = short_names(self.vary)
        named = [[f"{names[axis]} {text}" for text in self.texts(axis)] for axis in self.vary]
        parts = [*itertools.product(*named)]
        folders = file_names(["_".join(words) or "all" for words in parts])
        return [
            Cell(dict(zip(self.vary, values, strict=True)), ", ".join(words), folder)
            for values, words, folder in zip(combinations, parts, folders, strict=True)
        ]

    def texts(self, axis: str) -> list[str]:
        """The values of an axis in words. Where a value is several options, these are named only
        if their values alone do not tell it from the others."""
        values = [value if isinstance(value, dict) else {"": value} for value in self.vary[axis]]
        plain = [" ".join(map(str, options.values())) for options in values]
        names = short_names(dict.fromkeys(key for options in values for key in options))
        named = [" ".join(f"{names[k]} {v}".strip() for k, v in o.items()) for o in values]
        found = plain if len({*plain}) == len(plain) else named
        return [text or "default" for text in found]

    @property
    def run_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def trials(self, variant: Variant) -> list[Tree]:
        """What to try for one method, options by dotted key; one empty trial without ``tune``."""
        axes = {key: values for key, values in self.tune.items() if self.tunable(variant, key)}
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]

    def trial_seeds(self, variant: Variant) -> int:
        """Validation seeds a trial of one method: all methods get the same number of runs."""
        lacking = (len(v) for key, v in self.tune.items() if not self.tunable(variant, key))
        return self.tune_seeds * math.prod(lacking)

    def tunable(self, variant: Variant, key: str) -> bool:
        """Whether a method has the option and leaves it open."""
        section, _, option = key.partition(".")
        if section != "method":
            return True
        # The same in every cell: _check_options() refuses anything else.
        common = merge(self.options, self.cells[0].tree).get("method")
        return has_option(variant, option, common) and option not in variant.options

    def config(self, cell: Cell, variant: Variant, trial: Tree, seed: int, tuning: bool) -> Config:
        """The configuration of one run."""
        return configure(
            merge(self.options, cell.tree),
            variant,
            *(nested(key, value) for key, value in trial.items()),
            {"seed": seed, **({"validation": VALIDATION} if tuning else {})},
        )


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two keys end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: name if count[name] == 1 else key for key, name in last.items()}


def file_names(texts: Sequence[str]) -> list[str]:
    """A name for a file or folder for each text. It is the text with dashes for spaces; where that
    is unsafe, too long or that of another text, a digest of the text keeps it apart."""
    plain = [text.replace(" ", "-") for text in texts]
    safe = [re.sub(r"[^\w.,+=\[\]-]+", "-", p, flags=re.ASCII).strip("-.")[:80] for p in plain]
    count = Counter(name.lower() for name in safe)  # there are file systems that ignore case
    return [
        name if name == p and count[name.lower()] == 1 else f"{name}-{_digest(text)}".lstrip("-")
        for text, p, name in zip(texts, plain, safe, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_experiment(path: Path, overrides: Tree | None = None) -> Experiment:
    """The experiment in a YAML file; ``overrides`` replace keys such as ``seeds``.

    Raises:
        FedrotError: a key is unknown or missing, a value has the wrong type, two cells or methods
            cannot be told apart, or a run's configuration would be wrong; every configuration is
            built here once, before anything runs.
    """
    # Not merged key by key: `vary` and `tune` keep their dotted keys.
    tree = {**_content(path), **(overrides or {})}
    try:
        experiment = _experiment(path.stem, tree)
        _check_options(experiment)
        experiment = _with_numbers(experiment, _check_configurations(experiment))
        _check_axes(experiment)
        _check_names(experiment)
        _check_runs(experiment)
    except FedrotError as error:
        raise FedrotError(f"{path}: {error}") from error
    return experiment


def _experiment(name: str, tree: Tree) -> Experiment:
    """From the content of its file; what its options mean is checked elsewhere."""
    known = {f.name for f in dataclasses.fields(Experiment)} - {"name"}
    for key in tree:
        if key not in known:
            raise FedrotError(f"unknown key {key!r}; known are {', '.join(sorted(known))}")
    tree = {key: value for key, value in tree.items() if value is not None}
    for key in ("title", "methods"):
        if tree.get(key, "") in ("", []):
            raise FedrotError(f"{key} is missing")
    for key, (kind, words) in SHAPES.items():
        if not isinstance(tree.get(key, kind()), kind):
            raise FedrotError(f"{key} must be {words}, got {tree[key]!r}")
    for key, least in LEAST.items():
        if type(value := tree.get(key, least)) is not int or value < least:
            raise FedrotError(f"{key} must be a whole number of at least {least}, got {value!r}")
    if (end := tree.get("first_seed", 0) + tree.get("seeds", 10)) > TUNE_SEED:
        raise FedrotError(
            f"first_seed + seeds must be at most {TUNE_SEED}, where the seeds of tuning begin, "
            f"got {end}"
        )
    vary, tune = tree.get("vary", {}), tree.get("tune", {})
    tune = {**{axis: v for axis, v in tune.items() if not v}, **flatten(tune)}
    for key, axes in (("vary", vary), ("tune", tune)):
        for axis, values in axes.items():
            if not isinstance(values, list) or not values:
                raise FedrotError(f"{key}.{axis} must be a list of values, got {values!r}")
    dotted = {
        axis: [flatten(value) if isinstance(value, dict) else value for value in values]
        for axis, values in vary.items()
    }
    options = joined(tree.get("options", {}))
    joined(tree.get("tune", {}))  # for its check
    parsed = {"vary": dotted, "tune": tune, "options": options}
    return Experiment(name, **{**tree, **parsed, "methods": _variants(tree["methods"])})


def _variants(methods: Sequence[Any]) -> list[Variant]:
    for method in methods:
        if not isinstance(method, str):
            raise FedrotError(f"methods must be text, as 'fedrot:lam=0.5', got {method!r}")
    try:
        variants = [parse_variant(method) for method in methods]
    except FedrotError as error:
        raise FedrotError(f"methods: {error}") from error
    labels = [variant.label for variant in variants]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise FedrotError(f"methods names {twice} twice")
    return variants


def _check_options(experiment: Experiment) -> None:
    """Methods are not given what they lack, so what all lack would change nothing."""
    varied = [*itertools.chain(*(_set_by(a, values) for a, values in experiment.vary.items()))]
    common = [merge(experiment.options, cell.tree).get("method") for cell in experiment.cells]
    given = [*itertools.product(experiment.methods, common)]
    _check_tuned_alone(experiment)
    for key in (*flatten(experiment.options), *varied, *experiment.tune):
        if key in ("seed", "validation"):
            raise FedrotError(f"{key} is set by the sweep itself: see seeds and first_seed")
        section, _, option = key.partition(".")
        if section == "method" and not any(has_option(v, option, own) for v, own in given):
            raise FedrotError(f"none of the methods has the option {key!r}")
        for variant in experiment.methods if section == "method" and key in varied else ():
            if option in variant.options:
                raise FedrotError(f"vary sets {key}, which {variant.label} sets itself")
        for variant in experiment.methods if section == "method" and key in experiment.tune else ():
            if len({has_option(variant, option, own) for own in common}) > 1:
                raise FedrotError(
                    f"tune: {key} has an effect on {variant.label} in some cells only"
                )


def _check_tuned_alone(experiment: Experiment) -> None:
    """Whether a tuned option has an effect must not hang on another one that is tuned."""
    tuned = [key.removeprefix("method.") for key in experiment.tune if key.startswith("method.")]
    for variant, key, by in itertools.product(experiment.methods, tuned, tuned):
        values = [{by: value} for value in experiment.tune[f"method.{by}"]]
        if key != by and len({has_option(variant, key, value) for value in values}) > 1:
            raise FedrotError(
                f"tune: whether method.{key} has an effect on {variant.label} hangs on "
                f"method.{by}, which is tuned too; name a method for each, as "
                f"'{variant.options['name']}:{by}=...'"
            )


def _set_by(axis: str, values: Sequence[Any]) -> list[str]:
    """The options that the values of an axis set."""
    keys = (value if isinstance(value, dict) else [axis] for value in values)
    return [*dict.fromkeys(itertools.chain(*keys))]


def _check_configurations(experiment: Experiment) -> dict[tuple[str, str], float]:
    """Builds them all; returns the numbers that options made of texts, by option and text."""
    numbers = {}
    for cell, variant in itertools.product(experiment.cells, experiment.methods):
        try:
            for trial in experiment.trials(variant):
                config = experiment.config(cell, variant, trial, 0, tuning=True)
                built = flatten(config.tree())
                for key, value in {**flatten(cell.tree), **trial}.items():
                    number = _number(value)
                    if number is not None and number == built.get(key):
                        numbers[key, value] = number
        except FedrotError as error:
            where = f"{variant.label}, {cell.label}" if cell.options else variant.label
            raise FedrotError(f"{where}: {error}") from error
    return numbers


def _number(value: Any) -> float | None:
    """The number that a text stands for, as 1e-2, which YAML reads as text."""
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _with_numbers(experiment: Experiment, numbers: Mapping[tuple[str, str], float]) -> Experiment:
    """The same with numbers for the texts that stand for them."""

    def one(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: one(k, v) for k, v in value.items()}
        return numbers.get((key, value), value) if isinstance(value, str) else value

    def all_of(axes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {axis: [one(axis, value) for value in values] for axis, values in axes.items()}

    return dataclasses.replace(
        experiment, vary=all_of(experiment.vary), tune=all_of(experiment.tune)
    )


def _check_axes(experiment: Experiment) -> None:
    """No value twice on one, no option set by two."""
    setters: dict[str, str] = {}
    for name, axes in (("vary", experiment.vary), ("tune", experiment.tune)):
        for axis, values in axes.items():
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise FedrotError(f"{name}.{axis} holds {value!r} twice")
            for key in _set_by(axis, values):
                if key in setters:
                    raise FedrotError(f"{setters[key]} and {name}.{axis} both set {key}")
                setters[key] = f"{name}.{axis}"


def _check_names(experiment: Experiment) -> None:
    """Runs are found by their folders and results by their labels, so no two may share one."""
    groups: tuple[tuple[str, Sequence[Cell | Variant]], ...] = (
        ("vary", experiment.cells),
        ("methods", experiment.methods),
    )
    for key, items in groups:
        for a, b in itertools.combinations(items, 2):
            if a.label == b.label or a.folder.lower() == b.folder.lower():
                what = f"label {a.label!r}" if a.label == b.label else f"folder {a.folder!r}"
                both = f"{dict(a.options)} and {dict(b.options)}"
                raise FedrotError(f"{key}: {both} share the {what}")


def _check_runs(experiment: Experiment) -> None:
    """No method is another one in a cell, no cell another one for all methods; one method may be
    the same in two, as FedIT where ``method.lam`` is varied."""
    seen: list[dict[str, Any]] = []
    for cell in experiment.cells:
        runs: dict[str, Any] = {}
        for variant in experiment.methods:
            trials = experiment.trials(variant)
            run = experiment.config(cell, variant, trials[0], 0, tuning=False).tree(), trials
            if twice := next((label for label, other in runs.items() if other == run), None):
                where = f" ({cell.label})" if cell.options else ""
                raise FedrotError(f"methods: {variant.label} is the same as {twice}{where}")
            runs[variant.label] = run
        seen.append(runs)
    found = zip(experiment.cells, seen, strict=True)
    for (a, ours), (b, theirs) in itertools.combinations(found, 2):
        if ours == theirs:
            raise FedrotError(f"vary: {a.label} and {b.label} are the same for every method")


def _content(path: Path) -> Tree:
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise FedrotError(f"{path}: must hold keys and values")
    return _text_keys(content)


def _text_keys(value: Any) -> Any:
    """The same with text for all keys: YAML reads some as numbers, dates or booleans."""
    if isinstance(value, dict):
        return {str(key): _text_keys(inner) for key, inner in value.items()}
    return [_text_keys(inner) for inner in value] if isinstance(value, list) else value
