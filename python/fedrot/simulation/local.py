"""Local training of all clients of a round in one batched pass.

The clients share one frozen backbone and differ in their LoRA factors alone. So the factors are
stacked, ``(N, r, k)`` and ``(N, d, r)``, and the model's forward is mapped over clients
(``torch.func.vmap``): the frozen matrix products run once over all clients' examples. The sum of
the client losses gives each client its own gradient, and an element-wise optimizer on the stacked
tensors is N separate ones. Activations of ``N * batch_size`` examples are held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call, vmap

from fedrot.config import Local
from fedrot.factors import Factors
from fedrot.simulation.adapter import parameter_names
from fedrot.tasks import Batch
from fedrot.tasks.base import Track, no_progress


def draw_batches(examples: Tensor, local: Local, generator: torch.Generator) -> Tensor:
    """Which examples a client sees: ``(steps, batch_size)`` drawn from its own, ``(n_i,)``."""
    shape = (local.steps, local.batch_size)
    return examples[torch.randint(len(examples), shape, generator=generator)]


def train_clients(
    model: PeftModel,
    starts: Sequence[Factors],
    train: Batch,
    batches: Sequence[Tensor],
    local: Local,
    track: Track = no_progress,
) -> tuple[list[Factors], Tensor]:
    """Train every client from its own factors on its own batches.

    Args:
        model: the shared model; its parameters are not changed.
        starts: ``N`` adapters of one shape.
        train: all training examples.
        batches: per client ``(steps, batch_size)`` indices into ``train``.
        local: optimizer and learning rate.

    Returns:
        the ``N`` trained adapters, and each client's mean training loss ``(N,)``. A client that
        diverged has a loss that is not finite.
    """
    stacked = _stack(model, starts)
    optimizer = _optimizer(local, list(stacked.values()))
    rows = torch.stack(list(batches), dim=1)  # (steps, N, batch_size)
    losses = torch.zeros(len(starts), dtype=torch.float64)

    def client_loss(parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        return functional_call(model, parameters, (), batch).loss

    client_losses = vmap(client_loss)
    for step in track(range(len(rows)), "local steps"):
        loss = client_losses(stacked, {key: value[rows[step]] for key, value in train.items()})
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses += loss.detach()
    return _unstack(model, stacked), losses / len(rows)


def _optimizer(local: Local, parameters: list[Tensor]) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[local.optimizer]
    return kind(parameters, lr=local.lr)


def _stack(model: PeftModel, clients: Sequence[Factors]) -> dict[str, Tensor]:
    """The clients' factors by parameter name, with the client as first dimension."""
    stacked = {}
    for module, (name_A, name_B) in parameter_names(model).items():
        stacked[name_A] = torch.stack([c.A[module] for c in clients]).requires_grad_()
        stacked[name_B] = torch.stack([c.B[module] for c in clients]).requires_grad_()
    return stacked


def _unstack(model: PeftModel, stacked: dict[str, Tensor]) -> list[Factors]:
    names = parameter_names(model)
    clients = next(iter(stacked.values())).shape[0]
    return [
        Factors(
            {module: stacked[a][i].detach() for module, (a, _) in names.items()},
            {module: stacked[b][i].detach() for module, (_, b) in names.items()},
        )
        for i in range(clients)
    ]
