"""Planted attackers: the last ``clients.attackers`` clients hand in what harms the average."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedrot.errors import FedrotError
from fedrot.factors import Factors, rank_of, truncate
from fedrot.server import Upload
from fedrot.tasks import TaskData

if TYPE_CHECKING:
    from fedrot.config import Clients
    from fedrot.simulation.participants import Start


def poisoned(
    data: TaskData, examples: list[Tensor], clients: Clients
) -> tuple[TaskData, list[Tensor]]:
    """``attack=labels``: attackers train on class ``c - 1 - y`` in the place of ``y``, of ``c``
    classes. Their examples are copies behind all others, so the honest ones stay as they are.

    Raises:
        FedrotError: the labels of the task are not classes.
    """
    if clients.attack != "labels" or not clients.attackers:
        return data, examples
    labels = data.train["labels"]
    if labels.dim() != 1:
        raise FedrotError("clients.attack=labels needs a task that classifies")
    largest, train, moved = int(labels.max()), dict(data.train), list(examples)
    for client in range(len(clients.honest), clients.count):
        rows, size = examples[client], len(train["labels"])
        copies = {key: value[rows] for key, value in data.train.items()}
        copies["labels"] = largest - copies["labels"]
        train = {key: torch.cat([value, copies[key]]) for key, value in train.items()}
        moved[client] = torch.arange(size, size + len(rows))
    return replace(data, train=train), moved


def spoiled(upload: Upload, start: Start, clients: Clients, generator: torch.Generator) -> Upload:
    """What a client hands in instead of what it trained; the same from an honest one.

    With ``s = clients.attack_strength``: ``sign-flip`` goes ``s`` times as far from the start in
    the opposite direction, ``noise`` adds normal numbers ``s`` times as large as the change.
    """
    if upload.client in clients.honest or clients.attack == "labels":
        return upload
    strength = clients.attack_strength

    def attack(new: Tensor, old: Tensor) -> Tensor:
        change = new - old
        if clients.attack == "sign-flip":
            return old - strength * change
        size = strength * change.float().square().mean().sqrt()
        noise = torch.randn(change.shape, generator=generator)
        return new + (size.cpu() * noise).to(new)

    A, B = upload.factors.A, upload.factors.B
    before = truncate(start.factors, rank_of(upload.factors))  # it may have pruned itself
    factors = Factors(
        {module: attack(t, before.A[module]) for module, t in A.items()},
        {module: attack(t, before.B[module]) for module, t in B.items()},
    )
    head = {name: attack(t, start.head[name]) for name, t in upload.head.items()}
    return Upload(upload.client, factors, head)
