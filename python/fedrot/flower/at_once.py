"""A server strategy for methods that look at all clients at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedrot.factors import Factors, resized
from fedrot.flower.rounds import Rounds, logger, weight_of
from fedrot.methods import Method


class FedLoRA(FedAvg):
    """Aggregates the LoRA factors of all clients by one of :mod:`fedrot.methods`::

        FedLoRA(FlexLoRA(energy=0.99))  # or FedRot(1.0, "optimal"), Robust("median"), ...

    For methods that need all clients together; ``FedRotAvg`` holds one at a time. Arrays of
    floating point that are no factors, as a trained head, become what the method makes of them: a
    robust rule is for them, too. All others are averaged as FedAvg does. Clients of smaller rank
    send their factors as they are.
    The new factors have the shapes of the global ones: where the method chooses a smaller rank,
    the last rows of ``A`` and columns of ``B`` are zero, and ``ranks`` (by layer) and ``rank``
    (their mean) are among the round's metrics.

    Args:
        method: one whose new global adapter is all that clients need: not FFA-LoRA, RoLoRA,
            FedSA-LoRA, FedEx-LoRA, FLoRA, nor ``FedRot(lag=2)``.
        nonfinite, rounds_done: as of :class:`fedrot.flower.FedRot`.
        fedavg: options of Flower's ``FedAvg``; ``weighted_by_key`` weighs the factors too.

    Raises:
        ValueError: an option is out of its range, or the method is one of those.
        TypeError: ``method`` is no method.

    In a round: ValueError or TypeError that names the node, the key and what is wrong with it.
    """

    def __init__(
        self, method: Method, *, nonfinite: str = "raise", rounds_done: int = 0, **fedavg: Any
    ) -> None:
        super().__init__(**fedavg)
        self.rounds = _Method(method, nonfinite, rounds_done)

    def summary(self) -> None:
        logger.info("\t├──> %s: %s", self.rounds.method.name, self.rounds.method)
        logger.info("\t│\t└── Rounds done before: %d", self.rounds.rounds_done)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.rounds.begin(server_round, arrays)
        return super().configure_train(round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        rounds, weights = self.rounds, []
        clients: list[Factors] = []
        rest: list[ArrayRecord] = []
        round = rounds.round(server_round)
        # In the order of the nodes, not of arrival: the same replies give the same bits.
        received = sorted(rounds.received(replies), key=lambda r: r[0].metadata.src_node_id)
        for reply, upload in received:
            if upload is not None:
                # Methods want one type: the first client's.
                dtype = next(iter(clients[0].A.values())).dtype if clients else None
                clients.append(rounds.reference.take(upload.values, upload.who, dtype))
                weights.append(weight_of(reply, self.weighted_by_key, upload.who))
                rest.append(rounds.rest(upload))
                rounds.check_rest(rest[-1], upload.who)
                reply.content[upload.key] = rest[-1]
        factors = rounds.aggregate(clients, weights, round) if clients else None
        arrays, metrics = super().aggregate_train(round, [reply for reply, _ in received])
        if arrays is None or factors is None:
            return None, metrics
        if rounds.method.chooses_ranks:
            ranks = [A.shape[0] for A in factors.A.values()]
            metrics = MetricRecord({**(metrics or {}), "ranks": ranks})
            metrics["rank"] = math.fsum(ranks) / len(ranks)
        new = rounds.reference.put(rounds.padded(factors))
        arrays.update(rounds.average_rest(rest, weights))  # that all sent the same, FedAvg has seen
        return rounds.together(new, arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.rounds.round(server_round)
        return super().configure_evaluate(round, arrays, config, grid)


class _Method(Rounds):
    """A method, and what it gets."""

    def __init__(self, method: Method, nonfinite: str, rounds_done: int) -> None:
        super().__init__(nonfinite, rounds_done)
        if not isinstance(method, Method):
            raise TypeError(f"method must be one of fedrot.methods, got {method!r}")
        method.check_stateless()
        self.method = method

    def refusal(self, wrapper: type) -> str:
        return (
            f"{wrapper.__name__} around FedLoRA: it calibrates its noise to a mean of clipped "
            f"factors, and {self.method.name} is none; use FedRot({wrapper.__name__}(...))"
        )

    def aggregate(self, clients: list[Factors], weights: list[float], round: int) -> Factors:
        dtype = next(iter(clients[0].A.values())).dtype
        # Flower counts rounds from 1, methods count from 0.
        return self.method.aggregate(
            clients,
            self.reference.factors(dtype),
            torch.tensor(weights, dtype=torch.float64),
            round=round - 1,
        )

    def check_rest(self, rest: ArrayRecord, who: str) -> None:
        """Raise ValueError where an array beside the factors has not the global one's shape."""
        start = self.reference.record
        for key, array in rest.items():
            if key in start and tuple(array.shape) != tuple(start[key].shape):
                raise ValueError(
                    f"{who}: {key!r} has shape {tuple(array.shape)}, the global one "
                    f"{tuple(start[key].shape)}"
                )

    def average_rest(self, rest: list[ArrayRecord], weights: list[float]) -> dict[str, Array]:
        """The arrays of floating point beside the factors that the global ones have, too."""
        start = self.reference.record
        keys = [
            key
            for key in rest[0]
            if key in start and np.issubdtype(np.dtype(start[key].dtype), np.floating)
        ]
        found = self.method.average_rest(
            [_tensors(own, keys) for own in rest],
            _tensors(start, keys),
            torch.tensor(weights, dtype=torch.float64),
        )
        new = {}
        for key in keys:
            with np.errstate(over="ignore"):
                value = found[key].numpy().astype(start[key].dtype)
            if not np.isfinite(value).all():
                raise ValueError(f"the new {key!r} does not fit into {value.dtype}")
            new[key] = Array(value)
        return new

    def padded(self, factors: Factors) -> Factors:
        """In the ranks of the global arrays."""
        tensors = self.reference.tensors
        ranks = {layer: len(tensors[key_A]) for layer, (key_A, _) in self.reference.layers.items()}
        return resized(factors, ranks)


def _tensors(record: ArrayRecord, keys: list[str]) -> dict[str, Tensor]:
    """In float64: NumPy has floats that PyTorch has not."""
    return {key: torch.from_numpy(record[key].numpy().astype(np.float64)) for key in keys}
