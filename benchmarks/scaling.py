"""Bytes, seconds and memory of a round for 10 to 10^6 clients and models of 1 to 70 billion
parameters, out of the times that ``benchmarks.streaming`` measured:

    python -m benchmarks.scaling      # prints the tables of docs/scaling.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.report import markdown

MEASURED = Path(__file__).parents[1] / "docs" / "scaling" / "streaming.json"

CLIENTS = (10, 10**3, 10**6)
FAN = 100  # children of a node of the tree
NETWORK = 10e9 / 8  # bytes/s into one machine: 10 Gbit/s
UPLOAD = 2  # bytes an element: clients send bfloat16
STATE = 8  # what an aggregator sends up the tree: a float64 mean
HELD = 20  # what it holds: reference 4, aligned client 4, sum 4, mean 8


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder's linear layers: query and output ``hidden x hidden``, key and value
    ``kv x hidden``, gate and up ``mlp x hidden``, down ``hidden x mlp``."""

    blocks: int
    hidden: int
    kv: int
    mlp: int

    def shapes(self, targets: str) -> list[tuple[int, int]]:
        """``(d, k)`` of the adapted layers of one block; ``targets`` is one of ``TARGETS``."""
        h, kv, mlp = self.hidden, self.kv, self.mlp
        attention = {"q": (h, h), "v": (kv, h), "k": (kv, h), "o": (h, h)}
        if targets == "q, v":
            return [attention[name] for name in "qv"]
        return [*attention.values(), (mlp, h), (mlp, h), (h, mlp)]


TARGETS = ("q, v", "all linear")
MODELS = {  # hidden_size, num_key_value_heads * head_dim, intermediate_size of their config.json
    "Llama-3.2-1B": Model(16, 2048, 512, 8192),
    "Llama-3-8B": Model(32, 4096, 1024, 14336),
    "Llama-3-70B": Model(80, 8192, 1024, 28672),
}


@dataclass(frozen=True)
class Adapter:
    model: str
    targets: str
    rank: int

    @property
    def elements(self) -> int:
        model = MODELS[self.model]
        return self.rank * model.blocks * sum(d + k for d, k in model.shapes(self.targets))

    @property
    def name(self) -> str:
        return f"{self.model} {self.targets} r{self.rank}"


ADAPTERS = [Adapter(m, targets, r) for m in MODELS for targets in TARGETS for r in (8, 16)]
ROUNDS = [
    Adapter("Llama-3.2-1B", "q, v", 8),
    Adapter("Llama-3-8B", "q, v", 16),
    Adapter("Llama-3-8B", "all linear", 16),
    Adapter("Llama-3-70B", "all linear", 16),
]


@dataclass(frozen=True)
class Load:
    """What one machine has to do; it computes while it receives."""

    received: float  # bytes
    compute: float  # seconds of one thread
    memory: float  # bytes

    @property
    def network(self) -> float:
        return self.received / NETWORK

    @property
    def seconds(self) -> float:
        return max(self.network, self.compute)


# ns per element of a client: "accept", "no alignment", "merge"
Costs = Mapping[str, float]


def one_server(adapter: Adapter, clients: int, costs: Costs, form: str = "accept") -> Load:
    """All clients go to one machine; with ``form="no alignment"`` they have aligned themselves."""
    e = adapter.elements
    return Load(clients * e * UPLOAD, clients * e * costs[form] * 1e-9, e * (HELD + UPLOAD))


def tree(adapter: Adapter, clients: int, costs: Costs) -> list[Load]:
    """``FAN`` clients or aggregators to an aggregator, until there is one: the load of a node of
    every level, from the leaves up. Levels work one after the other."""
    e = adapter.elements
    loads = [one_server(adapter, min(FAN, clients), costs)]
    nodes = math.ceil(clients / FAN)
    while nodes > 1:
        children, nodes = min(FAN, nodes), math.ceil(nodes / FAN)
        compute = children * e * costs["merge"] * 1e-9
        loads.append(Load(children * e * STATE, compute, e * (HELD + STATE)))
    return loads


def machines(clients: int) -> int:
    """The nodes of a tree over so many clients."""
    nodes = [math.ceil(clients / FAN)]
    while nodes[-1] > 1:
        nodes.append(math.ceil(nodes[-1] / FAN))
    return sum(nodes)


def costs_of(measured: Mapping[str, Any], rank: int) -> Costs:
    """What was measured for bfloat16 clients of this rank."""
    rows = [r for r in measured["costs"] if (r["dtype"], r["rank"]) == ("bfloat16", rank)]
    return rows[0]["ns"]


def adapters(measured: Mapping[str, Any]) -> str:
    """The table of one client and one aggregator, for every adapter."""
    lines = []
    for adapter in ADAPTERS:
        load = one_server(adapter, 1, costs_of(measured, adapter.rank))
        numbers = size(load.received), duration(load.compute), size(load.memory)
        kept = size(1000 * load.received)
        elements = f"{adapter.elements / 1e6:.1f} M"
        lines.append([adapter.model, adapter.targets, str(adapter.rank), elements, *numbers, kept])
    names = ("upload", "align one client", "aggregator", "1000 clients kept")
    return markdown.table(("model", "adapted", "rank", "elements", *names), lines)


def rounds(measured: Mapping[str, Any]) -> str:
    """The table of whole rounds."""
    lines = []
    for adapter in ROUNDS:
        costs = costs_of(measured, adapter.rank)
        for clients in CLIENTS:
            server = one_server(adapter, clients, costs)
            aligned = one_server(adapter, clients, costs, "no alignment")
            levels = tree(adapter, clients, costs)
            lines.append(
                [
                    *(adapter.name, f"{clients:,}", size(server.received)),
                    *(duration(t) for t in (server.network, server.compute, aligned.compute)),
                    *(f"{machines(clients):,}", size(max(load.received for load in levels))),
                    duration(sum(load.seconds for load in levels)),
                ]
            )
    header = (
        *("adapter", "clients", "uploads", "one server: receives in", "aligns in"),
        *("clients aligned, averages in", "tree: machines", "one receives", "takes"),
    )
    return markdown.table(header, lines)


def size(count: float) -> str:
    """Bytes in decimal units, two digits at least."""
    power = min(4, int(math.log10(max(count, 1)) + 1e-9) // 3)
    return f"{_digits(count / 1000**power)} {('', 'k', 'M', 'G', 'T')[power]}B"


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for unit, length, limit in (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0)):
        if seconds < limit:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds / 3600)} h"


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


if __name__ == "__main__":
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    print(adapters(results))
    print(rounds(results))
