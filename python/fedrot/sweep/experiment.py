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
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedrot.config import Config
from fedrot.errors import FedrotError
from fedrot.options import Tree, flatten, merge, nested
from fedrot.simulation.comparison import Variant, configure, has_option, parse_variant

TUNE_SEED = 10_000  # seeds of the tuning runs begin here, apart from those of the results
VALIDATION = 0.2  # of the training examples, while tuning


@dataclass(frozen=True)
class Cell:
    """One condition: the varied options."""

    options: Mapping[str, Any]  # by dotted key, or by any name a mapping of several options

    @property
    def tree(self) -> Tree:
        several = (v if isinstance(v, dict) else {key: v} for key, v in self.options.items())
        return merge(*(nested(k, v) for options in several for k, v in options.items()))

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._parts())

    @property
    def folder(self) -> str:
        return "_".join(f"{n}-{v}".replace(" ", "-") for n, v in self._parts()) or "all"

    def _parts(self) -> Iterator[tuple[str, str]]:
        for key, value in self.options.items():
            several = value.values() if isinstance(value, dict) else [value]
            yield key.rpartition(".")[2], " ".join(map(str, several))


@dataclass(frozen=True)
class Experiment:
    """See the head of this module."""

    name: str
    title: str
    methods: Sequence[Variant]
    claim: str = ""
    options: Tree = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tune_seeds: int = 2
    seeds: int = 10
    first_seed: int = 0

    @property
    def cells(self) -> list[Cell]:
        combinations = itertools.product(*self.vary.values())
        return [Cell(dict(zip(self.vary, values, strict=True))) for values in combinations]

    def trials(self, variant: Variant) -> list[Tree]:
        """What to try for one method, options by dotted key; one empty trial without ``tune``."""
        axes = {key: values for key, values in self.tune.items() if tunable(variant, key)}
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]

    def trial_seeds(self, variant: Variant) -> int:
        """Validation seeds a trial of one method: all methods get the same number of runs."""
        lacking = (len(v) for key, v in self.tune.items() if not tunable(variant, key))
        return self.tune_seeds * math.prod(lacking)

    def config(self, cell: Cell, variant: Variant, trial: Tree, seed: int, tuning: bool) -> Config:
        """The configuration of one run."""
        return configure(
            merge(self.options, cell.tree),
            variant,
            *(nested(key, value) for key, value in trial.items()),
            {"seed": seed, **({"validation": VALIDATION} if tuning else {})},
        )


def tunable(variant: Variant, key: str) -> bool:
    section, _, option = key.partition(".")
    return section != "method" or (has_option(variant, option) and option not in variant.options)


def read_experiment(path: Path, overrides: Tree | None = None) -> Experiment:
    """The experiment in a YAML file; ``overrides`` replace keys such as ``seeds``.

    Raises:
        FedrotError: a key is unknown or missing, or a run's configuration would be wrong; every
            configuration is built here once, before anything runs.
    """
    # Not merged key by key: `vary` and `tune` keep their dotted keys.
    tree = {**_content(path), **(overrides or {})}
    known = {f.name for f in dataclasses.fields(Experiment)} - {"name"}
    for key in tree:
        if key not in known:
            raise FedrotError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    for key in ("title", "methods"):
        if not tree.get(key):
            raise FedrotError(f"{path}: {key} is missing")
    tree["tune"] = flatten(tree.get("tune") or {})
    tree["vary"] = dict(tree.get("vary") or {})
    for key in ("vary", "tune"):
        for axis, values in tree[key].items():
            if not isinstance(values, list) or not values:
                raise FedrotError(f"{path}: {key}.{axis} must be a list of values, got {values!r}")
    for key in ("seeds", "tune_seeds"):
        if not isinstance(tree.get(key, 1), int) or tree.get(key, 1) < 1:
            raise FedrotError(f"{path}: {key} must be a whole number of at least 1")
    try:
        variants = [parse_variant(str(text)) for text in tree["methods"]]
    except FedrotError as error:
        raise FedrotError(f"{path}: {error}") from error
    labels = [variant.label for variant in variants]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise FedrotError(f"{path}: methods names {twice} twice")
    options = merge(*(nested(str(k), v) for k, v in (tree.get("options") or {}).items()))
    experiment = Experiment(path.stem, **{**tree, "methods": variants, "options": options})
    for cell, variant in itertools.product(experiment.cells, variants):
        try:
            for trial in experiment.trials(variant):
                experiment.config(cell, variant, trial, 0, tuning=True)
        except FedrotError as error:
            where = f"{variant.label}, {cell.label}" if cell.options else variant.label
            raise FedrotError(f"{path}: {where}: {error}") from error
    return experiment


def _content(path: Path) -> Tree:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FedrotError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise FedrotError(f"{path}: must hold keys and values")
    return content
