"""Who trains in a round, and from what: the global factors, older ones, or factors of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor

from fedrot.config import Config
from fedrot.factors import Factors, truncate
from fedrot.methods import Server
from fedrot.simulation.adapter import draw_factors
from fedrot.simulation.seeding import generator


@dataclass(frozen=True)
class Start:
    """What a client trains from; ``head`` is empty where the head is frozen."""

    factors: Factors
    head: dict[str, Tensor]


def participants(config: Config, round: int) -> list[int]:
    """Who trains in a round; the seed and the round decide."""
    count, chosen = config.clients.count, config.clients.per_round
    if chosen == count:
        return list(range(count))
    order = torch.randperm(count, generator=generator(config.seed, "participants", round))
    return sorted(order[:chosen].tolist())


def start(
    config: Config, model: PeftModel, server: Server, client: int, head: dict[str, Tensor]
) -> Start:
    """Where a participant starts the round after ``server.rounds``; ``head``: the untrained one."""
    round, seed, clients = server.rounds, config.seed, config.clients
    rank, own = _rank(config, server, client), None
    if config.start == "own":
        own = generator(seed, "start", client + 1)
    elif clients.restarts and _drawn(config, "restart", round, client) < clients.restarts:
        own = generator(seed, "restarted", round, client)
    if own is not None:
        return Start(truncate(draw_factors(model, own), rank), head)
    if clients.delay and server.past:
        late = int(_drawn(config, "delay", round, client) * (clients.delay + 1))
        old = (server, *server.past)[min(late, len(server.past))]
        server = replace(server, factors=old.factors, head=old.head)
    return own_model(config, server, client, head)


def own_model(config: Config, server: Server, client: int, head: dict[str, Tensor]) -> Start:
    """A client's own model: the global one but for what stays with the client."""
    factors = config.method.download(server, client, _rank(config, server, client))
    personal = config.local.personal_head
    return Start(factors, server.heads.get(client, head) if personal else server.head)


def _rank(config: Config, server: Server, client: int) -> int | None:
    """That of the configuration or, if it is smaller, what the client has pruned itself to."""
    given = config.clients.rank(client, server.rounds)
    known = [rank for rank in (given, server.ranks.get(client)) if rank is not None]
    return min(known, default=None)


def _drawn(config: Config, purpose: str, round: int, client: int) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator(config.seed, purpose, round, client)))
