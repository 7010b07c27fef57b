"""The server's side of one round: aggregate, fold, step, and what to keep for the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedrot.factors import Factors, rank_of
from fedrot.methods import Method, Server
from fedrot.optimizers import ServerOptimizer


@dataclass(frozen=True)
class Upload:
    """What one client hands in; ``head`` is empty where the head is frozen."""

    client: int
    factors: Factors
    head: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """The server after a round, and how it got there: the aggregate before the server optimizer's
    step, and what was folded into the frozen weights."""

    server: Server
    aggregate: Factors
    folded: dict[str, Tensor]


def serve(
    method: Method,
    optimizer: ServerOptimizer,
    server: Server,
    uploads: Sequence[Upload],
    weights: Tensor | None = None,
    *,
    reference: Factors | None = None,
    generator: torch.Generator | None = None,
    past: int = 1,
    personal_head: bool = False,
) -> Update:
    """One round. ``reference`` replaces the method's own where clients did not start together;
    ``past``: of how many earlier rounds the new server keeps the factors; ``personal_head``: heads
    stay with their clients."""
    round, factors = server.rounds, [upload.factors for upload in uploads]
    reference = reference or method.reference(server)
    aggregate = method.aggregate(factors, reference, weights, round=round, generator=generator)
    folded = method.fold(factors, aggregate, weights)
    like = uploads[0].head
    heads = method.average_rest([upload.head for upload in uploads], server.head or like, weights)
    head = {name: heads[name].to(t.dtype) for name, t in like.items()}
    parts = "A" if method.personal else method.parts(round)
    shared, new_head = ({}, {}) if personal_head else (server.head, head)
    before = _parameters(server.factors, shared, parts)
    after, state = optimizer.step(before, _parameters(aggregate, new_head, parts), server.optimizer)
    own = {u.client: u.factors.B for u in uploads} if method.personal else {}
    pruned = {u.client: rank_of(u.factors) for u in uploads} if method.prunes else {}
    own_heads = {u.client: u.head for u in uploads} if personal_head else {}
    merged = {
        module: server.merged[module] + delta if module in server.merged else delta
        for module, delta in folded.items()
    }
    stepped = replace(
        server,
        rounds=round + 1,
        factors=Factors(
            {m: after.get(f"A/{m}", A) for m, A in aggregate.A.items()},
            {m: after.get(f"B/{m}", B) for m, B in aggregate.B.items()},
        ),
        past=(Server(server.factors, round, head=server.head), *server.past)[:past],
        merged=merged,
        personal={**server.personal, **own},
        head={name: after.get(f"head/{name}", mean) for name, mean in head.items()},
        heads={**server.heads, **own_heads},
        optimizer=state,
        ranks={**server.ranks, **pruned},
    )
    return Update(stepped, aggregate, folded)


def _parameters(factors: Factors, head: dict[str, Tensor], parts: str) -> dict[str, Tensor]:
    """What the optimizer moves, by one flat name each: what clients train and share."""
    A = {f"A/{m}": t for m, t in factors.A.items()} if "A" in parts else {}
    B = {f"B/{m}": t for m, t in factors.B.items()} if "B" in parts else {}
    return {**A, **B, **{f"head/{name}": t for name, t in head.items()}}
