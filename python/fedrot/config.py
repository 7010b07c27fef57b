"""The configuration of a run, and the named settings.

Later sources win: defaults, the task's preset, the setting, the YAML file, the overrides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedrot.errors import FedrotError
from fedrot.methods import METHODS, FedRot, Method
from fedrot.optimizers import ServerOptimizer
from fedrot.options import Tree, build, merge, option, pick, to_tree
from fedrot.tasks import TASKS, Digits, Task


@dataclass(frozen=True)
class Clients:
    """Who takes part, and with which of the training examples.

    ``alpha``: concentration of the ``dirichlet`` partition of every label, small is uneven.
    ``labels``: how many different ones each client has in the ``labels`` partition. ``column``:
    whose values are the clients in the ``column`` partition. ``local_test``: every client's model
    is also scored on test examples with the client's own mix of labels.
    ``participation``: who of them trains in a round, drawn anew every round: a fraction up to 1,
    or a whole number of clients from 2 on. ``weights``: what a client counts in the average.
    ``ranks``: the clients' own ranks in turn, none above ``lora.r``, which all have for ``null``;
    the scaling is that of ``lora.r`` for all. ``ranks_change``: every client goes on to the next of
    them from round to round.
    ``delay``: a participant starts from the global factors (and head) of up to so many rounds ago,
    or from the first; how many is drawn anew for every one, none to ``delay`` alike. ``restarts``:
    the probability that a participant does not have the global factors and trains from random ones
    of its own, as ``start=own``, and the untrained head.

    ``attackers``: so many, the last ones, try to spoil the average (``simulation/attacks.py``):
    by the ``attack`` ``sign-flip`` or ``noise``, ``attack_strength`` times as large as the change
    that they trained, or by training on wrong ``labels``.
    """

    count: int = option(10, at_least=1)
    partition: str = option("dirichlet", choices=("dirichlet", "iid", "labels", "column"))
    alpha: float = option(0.5, above=0)
    labels: int = option(1, at_least=1)
    column: str | None = option(None)
    local_test: bool = option(False)
    participation: float = option(1.0, above=0)
    weights: str = option("uniform", choices=("uniform", "samples"))
    ranks: tuple[int, ...] | None = option(None, at_least=1)
    ranks_change: bool = option(False)
    delay: int = option(0, at_least=0)
    restarts: float = option(0.0, at_least=0, at_most=1)
    attackers: int = option(0, at_least=0)
    attack: str = option("sign-flip", choices=("sign-flip", "noise", "labels"))
    attack_strength: float = option(10.0, above=0)

    def __post_init__(self) -> None:
        if self.participation > 1 and self.participation not in range(2, self.count + 1):
            raise FedrotError(
                "clients.participation must be a fraction up to 1, or a whole number from 2 to "
                f"clients.count={self.count}, got {self.participation:g}"
            )

        if self.attackers >= self.count:
            raise FedrotError(
                f"clients.attackers must be below clients.count={self.count}, got {self.attackers}"
            )

    @property
    def by_column(self) -> str | None:
        """The column whose values are the clients."""
        return self.column if self.partition == "column" else None

    @property
    def per_round(self) -> int:
        """How many clients train in a round."""
        if self.participation > 1:
            return int(self.participation)
        return max(1, round(self.participation * self.count))

    @property
    def honest(self) -> range:
        """The clients that are no attackers, which are the last ones."""
        return range(self.count - self.attackers)

    def rank(self, client: int, round: int = 0) -> int | None:
        """The client's own rank in a round, from 0; ``None`` is the global one."""
        if not self.ranks:
            return None
        turn = client + round if self.ranks_change else client
        return self.ranks[turn % len(self.ranks)]


@dataclass(frozen=True)
class Lora:
    """The adapter: rank ``r`` and ``alpha``; the scaling is ``alpha / r``. ``dropout``: of its
    input while clients train."""

    r: int = option(4, at_least=1)
    alpha: int = option(8, at_least=1)
    dropout: float = option(0.0, at_least=0, below=1)


@dataclass(frozen=True)
class Local:
    """Local training in one round: ``steps`` mini-batches drawn with replacement, or ``epochs``
    over the client's examples instead.

    ``head``: the base model's head, as transformers counts it, is trained and averaged too.
    ``personal_head``: it stays with its client instead, from the untrained one on (FedPer, arXiv
    1912.00818). ``prox``: weight of FedProx's ``prox / 2 |theta - start|^2`` (arXiv 1812.06127).
    ``lr_ratio``: learning rate of ``B`` over that of ``A`` (LoRA+, arXiv 2402.12354). ``clip``:
    largest norm of a client's gradient. ``together``: how many clients go through the model at a
    time, ``null`` for all (or one, where the model does not allow more); ``micro_batch``: with how
    many examples of each, ``null`` for a whole batch, else gradients are accumulated. The memory
    changes, the numbers only by rounding; but with dropout, pieces of another size draw other
    masks.
    """

    optimizer: str = option("sgd", choices=("sgd", "adam", "adamw"))
    lr: float = option(0.3, above=0)
    steps: int = option(20, at_least=1)
    epochs: int | None = option(None, at_least=1)
    batch_size: int = option(16, at_least=1)
    head: bool = option(False)
    personal_head: bool = option(False)
    momentum: float = option(0.0, at_least=0, below=1)
    weight_decay: float = option(0.0, at_least=0)
    prox: float = option(0.0, at_least=0)
    lr_ratio: float = option(1.0, above=0)
    clip: float | None = option(None, above=0)
    together: int | None = option(None, at_least=1)
    micro_batch: int | None = option(None, at_least=1)

    def __post_init__(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise FedrotError(f"local.momentum is an option of sgd, not of {self.optimizer}")
        if self.personal_head and not self.head:
            raise FedrotError("local.personal_head=true needs local.head=true: it is not trained")


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of one run.

    ``validation``: this fraction of the training examples is held out and takes the place of the
    test part, for choosing options.

    ``threads`` of PyTorch: one by default, so that numbers do not depend on the number of cores
    (and a model this small gains little from more); ``null`` leaves PyTorch's choice.

    ``device``: where clients train and models are scored, ``auto`` is CUDA where there is one. The
    server works on the CPU.
    """

    setting: str = option("rounds", choices=("rounds", "regauge", "one-shot"))
    seed: int = option(0, at_least=0, below=2**32)
    rounds: int = option(12, at_least=1)
    start: str = option("shared", choices=("shared", "own"))
    regauge: bool = option(False)
    validation: float = option(0.0, at_least=0, below=1)
    threads: int | None = option(1, at_least=1)
    device: str = option("cpu", choices=("cpu", "cuda", "auto"))
    clients: Clients = field(default_factory=Clients)
    lora: Lora = field(default_factory=Lora)
    local: Local = field(default_factory=Local)
    task: Task = field(default_factory=Digits, metadata={"kinds": TASKS})
    method: Method = field(default_factory=FedRot, metadata={"kinds": METHODS})
    server: ServerOptimizer = field(default_factory=ServerOptimizer)

    def __post_init__(self) -> None:
        method, server, own = self.method, self.server, self.start == "own"
        if own and self.rounds != 1:
            raise FedrotError(f"start=own merges once, so rounds must be 1, got {self.rounds}")
        if own and method.personal:
            raise FedrotError(f"{method.name} leaves B with the clients: start=own merges nothing")
        if own and self.local.personal_head:
            raise FedrotError(
                "local.personal_head=true: start=own merges once, and every upload has its own "
                "head; it must be false"
            )
        if method.same_A and (own or self.regauge):
            key = "start=own" if own else "regauge"
            raise FedrotError(f"{method.name} has one A for all clients, {key} gives each its own")
        if own and not server.plain:
            raise FedrotError(
                f"server.optimizer={server.optimizer}, lr {server.rate:g} steps from the global "
                "factors, and start=own has none"
            )
        if not method.steady_basis and not server.plain:
            raise FedrotError(
                f"{method.name} cannot go with server.optimizer={server.optimizer}, lr "
                f"{server.rate:g}: its factors change basis or rank every round, or belong to what "
                "was folded into the frozen weights; only fedavg with lr 1 leaves them as they are"
            )
        try:
            method.check_clients(self.clients.per_round)
        except ValueError as error:
            raise FedrotError(f"method: {error} in a round") from error
        self._check_late()
        if self.clients.ranks and max(self.clients.ranks) > self.lora.r:
            largest = max(self.clients.ranks)
            raise FedrotError(f"clients.ranks must not exceed lora.r={self.lora.r}, got {largest}")
        if self.clients.ranks_change and not self.clients.ranks:
            raise FedrotError("clients.ranks_change=true needs clients.ranks, as [2, 4]")
        if self.clients.ranks_change and method.prunes:
            raise FedrotError(
                f"clients of {method.name} keep the rank that they have pruned themselves to: "
                "clients.ranks_change must be false, or method.decay=1"
            )
        if self.clients.ranks_change and method.personal:
            raise FedrotError(
                f"{method.name} leaves B with the clients, which has one rank: "
                "clients.ranks_change must be false"
            )

    def _check_late(self) -> None:
        """Of clients without the latest global factors."""
        method, clients = self.method, self.clients
        for key, late in (("delay", clients.delay), ("restarts", clients.restarts)):
            if late and self.start == "own":
                raise FedrotError(f"clients.{key}={late:g}: start=own has nothing global to miss")
            if late and method.personal:
                raise FedrotError(
                    f"clients.{key}={late:g}: {method.name} leaves B with the clients, and it fits "
                    "the latest A"
                )
            if late and method.folds:
                raise FedrotError(
                    f"clients.{key}={late:g}: {method.name} folds into the frozen weights, and all "
                    "clients of a simulation share one state of these"
                )
        if clients.delay and method.parts(0) != method.parts(1):
            raise FedrotError(
                f"clients.delay={clients.delay}: {method.name} trains one factor in a round, "
                "and a late client's other one would be an old one"
            )
        if clients.restarts and method.same_A:
            raise FedrotError(
                f"{method.name} has one A for all clients, clients.restarts gives some their own"
            )

    @property
    def synthetic(self) -> bool:
        """Whether bases are turned on purpose; every output says so."""
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
        {},
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
        FedrotError: a key is unknown, a value has the wrong type or range, or an attack is given
            without the number of attackers, or a strength that it has not.
    """
    given = merge(*sources)
    name = given.get("setting", "rounds")
    preset = pick(SETTINGS, name, "setting").options
    task = _task_preset(given.get("task"))
    preset = {**preset, "method": _fitting(preset.get("method", {}), given.get("method"))}
    config: Config = build(Config, merge({"setting": name}, task, preset, given))
    _check_attack(given.get("clients", {}))
    return config


def _check_attack(clients: Tree) -> None:
    """An attack of nobody would change nothing, nor would a strength of wrong labels;
    ``attackers: 0`` beside an attack is meant, as the baseline of a sweep."""
    for key in ("attack", "attack_strength"):
        if key in clients and "attackers" not in clients:
            raise FedrotError(
                f"clients.{key}={clients[key]} needs clients.attackers, how many clients attack"
            )
    strength = clients.get("attack_strength", Clients.attack_strength)
    if clients.get("attack") == "labels" and strength != Clients.attack_strength:
        raise FedrotError(
            "clients.attack_strength is of sign-flip and noise, clients.attack=labels has none, "
            f"got {strength}"
        )


def without_idle(tree: Tree) -> Tree:
    """The same, less the options of the method that have no effect beside its others: what older
    versions wrote into ``config.yaml``, and this one refuses."""
    method = tree.get("method")
    if not isinstance(method, dict) or method.get("name") not in [*METHODS]:
        return tree
    kind = METHODS[method["name"]]
    idle = {f.name for f in dataclasses.fields(kind)} - kind.takes(method)
    return {**tree, "method": {key: value for key, value in method.items() if key not in idle}}


def _task_preset(task: Any) -> Tree:
    name = task.get("name", "digits") if isinstance(task, dict) else "digits"
    kind = TASKS.get(name) if isinstance(name, str) else None
    return kind.preset if kind else {}  # an unknown name is refused by `build`


def _fitting(options: Tree, method: Any) -> Tree:
    """The options of a preset that the chosen method has (FedIT has no ``lam``)."""
    given = method if isinstance(method, dict) else {}
    name = given.get("name", "fedrot")
    kind = METHODS.get(name) if isinstance(name, str) else None
    known = kind.takes(given) if kind else set()
    return {key: value for key, value in options.items() if key in known}
