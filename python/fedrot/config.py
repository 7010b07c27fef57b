"""The configuration of a run, and the named settings.

Later sources win: defaults, the setting, the YAML file, the overrides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedrot.errors import FedrotError
from fedrot.methods import METHODS, FedRot, Method
from fedrot.options import Tree, build, merge, option, pick, to_tree
from fedrot.tasks import TASKS, Digits, Task


@dataclass(frozen=True)
class Clients:
    """Who takes part. ``alpha``: Dirichlet concentration of the label split, small is uneven."""

    count: int = option(10, at_least=1)
    alpha: float = option(0.5, above=0)


@dataclass(frozen=True)
class Lora:
    """The adapter: rank ``r`` and ``alpha``; the scaling is ``alpha / r``."""

    r: int = option(4, at_least=1)
    alpha: int = option(8, at_least=1)


@dataclass(frozen=True)
class Local:
    """Local training in one round: ``steps`` mini-batches drawn with replacement, or ``epochs``
    over the client's examples instead.

    ``prox``: weight of FedProx's ``prox / 2 |theta - start|^2`` (arXiv 1812.06127). ``lr_ratio``:
    learning rate of ``B`` over that of ``A`` (LoRA+, arXiv 2402.12354). ``clip``: largest norm of
    a client's gradient. ``together``: how many clients go through the model at a time, ``null``
    for all; the numbers are the same to rounding, the memory is not.
    """

    optimizer: str = option("sgd", choices=("sgd", "adam", "adamw"))
    lr: float = option(0.3, above=0)
    steps: int = option(20, at_least=1)
    epochs: int | None = option(None, at_least=1)
    batch_size: int = option(16, at_least=1)
    momentum: float = option(0.0, at_least=0, below=1)
    weight_decay: float = option(0.0, at_least=0)
    prox: float = option(0.0, at_least=0)
    lr_ratio: float = option(1.0, above=0)
    clip: float | None = option(None, above=0)
    together: int | None = option(None, at_least=1)

    def __post_init__(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise FedrotError(f"local.momentum is an option of sgd, not of {self.optimizer}")


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of one run.

    ``validation``: this fraction of the training examples is held out and takes the place of the
    test part, for choosing options.

    ``threads`` of PyTorch: one by default, so that numbers do not depend on the number of cores
    (and a model this small gains little from more); ``null`` leaves PyTorch's choice.
    """

    setting: str = option("rounds", choices=("rounds", "regauge", "one-shot"))
    seed: int = option(0, at_least=0, below=2**32)
    rounds: int = option(12, at_least=1)
    start: str = option("shared", choices=("shared", "own"))
    regauge: bool = option(False)
    validation: float = option(0.0, at_least=0, below=1)
    threads: int | None = option(1, at_least=1)
    clients: Clients = field(default_factory=Clients)
    lora: Lora = field(default_factory=Lora)
    local: Local = field(default_factory=Local)
    task: Task = field(default_factory=Digits, metadata={"kinds": TASKS})
    method: Method = field(default_factory=FedRot, metadata={"kinds": METHODS})

    def __post_init__(self) -> None:
        if self.start == "own" and self.rounds != 1:
            raise FedrotError(f"start=own merges once, so rounds must be 1, got {self.rounds}")

    @property
    def synthetic(self) -> bool:
        """Whether the mismatch between clients is planted; every output says so."""
        return self.regauge

    def tree(self) -> Tree:
        """The same as nested dictionaries of plain values."""
        return to_tree(self)


@dataclass(frozen=True)
class Setting:
    """A named preset over the configuration, and what it stands for."""

    text: str
    options: Tree


SETTINGS = {
    "rounds": Setting(
        "Clients start every round from the shared global factors.",
        {"method": {"lam": 0.4}},
    ),
    "regauge": Setting(
        "Synthetic: every client hands in its factors in a random orthogonal basis of its own "
        "(B R, R^T A), as after a local re-compression; the products B A are unchanged. Otherwise "
        "as rounds.",
        {"regauge": True, "method": {"lam": 1.0}},
    ),
    "one-shot": Setting(
        "Every client draws its own A and trains alone; the adapters are merged once, with the "
        "first client as reference. Every method gets the same uploads.",
        {
            "start": "own",
            "rounds": 1,
            "local": {"optimizer": "adam", "lr": 1e-2, "steps": 200},
            "method": {"lam": 1.0},
        },
    ),
}


def load(*sources: Tree) -> Config:
    """The configuration that the sources give together; later ones win.

    Raises:
        FedrotError: a key is unknown, or a value has the wrong type or range.
    """
    given = merge(*sources)
    name = given.get("setting", "rounds")
    preset = pick(SETTINGS, name, "setting").options
    preset = {**preset, "method": _fitting(preset["method"], given.get("method"))}
    return build(Config, merge({"setting": name}, preset, given))


def _fitting(options: Tree, method: Any) -> Tree:
    """The options of a preset that the chosen method has (FedIT has no ``lam``)."""
    name = method.get("name", "fedrot") if isinstance(method, dict) else "fedrot"
    kind = METHODS.get(name) if isinstance(name, str) else None
    known = {f.name for f in dataclasses.fields(kind)} if kind else set()
    return {key: value for key, value in options.items() if key in known}
