"""Server strategies that align the clients' LoRA factors: around another strategy, or fused."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedrot import methods
from fedrot.factors import Factors
from fedrot.flower.at_once import FedLoRA
from fedrot.flower.rounds import CLIENT_SIDE_CLIPPING, Rounds, weight_of
from fedrot.streaming import StreamingAggregator

logger = logging.getLogger("flwr")


class FedRot(Strategy):
    """Rotates every reply toward the round's global factors, then leaves it to another strategy.

    FedRot-LoRA, arXiv 2602.23638. Arrays that are no LoRA factors pass as they are. A client of
    smaller rank comes out padded to the global one. The arrays that the other strategy returns
    keep the floating-point types that they had before the round (Flower's FedAdam makes them
    float64). All clients must use one scaling ``lora_alpha / r``: arrays do not say it.

    Args:
        strategy: aggregates the rotated replies; also one of Flower's wrappers for differential
            privacy with server-side clipping.
        lam: soft rotation in [0, 1]; 0 leaves the replies as they are, 1 rotates fully.
        align: what the rotation is fitted to: ``"joint"``, ``"A"``, ``"B"``, or the paper's
            ``"alternate"``: the first round unaligned, then A in even and B in odd rounds as
            Flower counts, from 1.
        proper: rotations only, no reflections.
        nonfinite: what NaN or infinity in a reply does: ``"raise"``, or ``"drop"``, which leaves
            the client out of the round with a warning.
        rounds_done: rounds of an earlier run that this one continues. ``start`` counts from 1
            again; the strategy inside, the clients and ``align="alternate"`` see the sum.

    Raises:
        ValueError: an option is out of its range, or a strategy inside must not be there.
        TypeError: ``strategy`` is none of the Message API.

    In a round: ValueError or TypeError that names the node, the key and what is wrong with it.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        nonfinite: str = "raise",
        rounds_done: int = 0,
    ) -> None:
        _check_inside(strategy)
        self.strategy = strategy
        self.alignment = _Alignment(lam, align, proper, nonfinite, rounds_done)

    def summary(self) -> None:
        self.alignment.summary()
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.alignment.begin(server_round, arrays)
        return self.strategy.configure_train(round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        alignment, kept = self.alignment, []
        round = alignment.round(server_round)
        for reply, upload in alignment.received(replies):
            if upload is not None:
                # Flower counts rounds from 1, methods count from 0.
                rotated = alignment.reference.rotate(
                    alignment.method, upload.values, upload.who, round=round - 1
                )
                reply.content[upload.key] = ArrayRecord({**upload.record, **rotated})
            kept.append(reply)
        arrays, metrics = self.strategy.aggregate_train(round, kept)
        return arrays and _typed_like(alignment.reference.record, arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.alignment.round(server_round)
        return self.strategy.configure_evaluate(round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(self.alignment.round(server_round), replies)


class FedRotAvg(FedAvg):
    """``FedRot(FedAvg(...))`` in one step: aligned and averaged client by client, in float32 sums.

    Holds one client at a time as tensors. The new factors have the clients' floating-point type;
    arrays that are no LoRA factors are averaged as FedAvg does.

    Args:
        lam, align, proper, nonfinite, rounds_done: as of :class:`FedRot`.
        fedavg: options of Flower's ``FedAvg``; ``weighted_by_key`` weighs the factors too.

    Raises:
        As :class:`FedRot`.
    """

    def __init__(
        self,
        *,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        nonfinite: str = "raise",
        rounds_done: int = 0,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.alignment = _Alignment(lam, align, proper, nonfinite, rounds_done)

    def summary(self) -> None:
        self.alignment.summary()
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.alignment.begin(server_round, arrays)
        return super().configure_train(round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        alignment, kept, aggregator = self.alignment, [], None
        round = alignment.round(server_round)
        for reply, upload in alignment.received(replies):
            if upload is not None:
                client = alignment.reference.take(upload.values, upload.who)
                aggregator = aggregator or alignment.aggregator(client, round)
                weight = weight_of(reply, self.weighted_by_key, upload.who)
                aggregator.accept(client, weight, name=upload.who)
                reply.content[upload.key] = alignment.rest(upload)
            kept.append(reply)
        new = alignment.reference.put(aggregator.finish()) if aggregator else {}
        # FedAvg averages what is left of the replies, and their metrics.
        arrays, metrics = super().aggregate_train(round, kept)
        return (None if arrays is None else alignment.together(new, arrays)), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        round = self.alignment.round(server_round)
        return super().configure_evaluate(round, arrays, config, grid)


class _Alignment(Rounds):
    """What ``FedRot`` and ``FedRotAvg`` rotate by."""

    def __init__(
        self, lam: float, align: str, proper: bool, nonfinite: str, rounds_done: int
    ) -> None:
        super().__init__(nonfinite, rounds_done)
        self.method = methods.FedRot.one_by_one(lam, align, proper)

    def refusal(self, wrapper: type) -> str:
        name = wrapper.__name__
        return f"{name} around FedRot clips before FedRot rotates; " + (
            "put fedrot_mod after the clipping mod in the clients' list of mods instead"
            if issubclass(wrapper, CLIENT_SIDE_CLIPPING)
            else f"write FedRot({name}(...))"
        )

    def summary(self) -> None:
        method = self.method
        logger.info("\t├──> FedRot-LoRA settings:")
        logger.info("\t│\t├── lam: %g | align: %s", method.lam, method.align)
        logger.info("\t│\t├── Rotations: %s", "proper" if method.proper else "with reflections")
        logger.info("\t│\t└── Rounds done before: %d", self.rounds_done)

    def aggregator(self, first: Factors, round: int) -> StreamingAggregator:
        """For a round; its result has the type of the first client's factors."""
        dtype = next(iter(first.A.values())).dtype
        lam, align = self.method.schedule(round - 1)
        return StreamingAggregator(
            self.reference.factors(dtype), lam=float(lam), align=align, proper=self.method.proper
        )


def _typed_like(given: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """Arrays that changed from one floating-point type to another as they were given."""
    typed = {}
    for key, array in arrays.items():
        wanted = np.dtype(given[key].dtype if key in given else array.dtype)
        if wanted != array.dtype and np.issubdtype(wanted, np.floating):
            array = Array(array.numpy().astype(wanted))
        typed[key] = array
    return ArrayRecord(typed)


def _check_inside(strategy: Strategy) -> None:
    """Raise where a strategy around which ``FedRot`` is put, or one inside, must not be there."""
    if not isinstance(strategy, Strategy):
        raise TypeError(
            "strategy must be one of flwr.serverapp.strategy, got "
            f"{type(strategy).__module__}.{type(strategy).__name__}; strategies of the legacy "
            "stack stay as they are, and the clients get fedrot_mod"
        )
    inner: Any = strategy
    while isinstance(inner, Strategy):
        name = type(inner).__name__
        if isinstance(inner, CLIENT_SIDE_CLIPPING):
            raise ValueError(
                f"FedRot around {name}: the clients have clipped before FedRot rotates; leave "
                "FedRot out and put fedrot_mod after the clipping mod in the clients' list of mods"
            )
        if isinstance(inner, FedRot | FedRotAvg):
            raise ValueError(f"FedRot around {name}: the replies would be rotated twice")
        if isinstance(inner, FedLoRA):
            raise ValueError(f"FedRot around {name}: its method takes the replies as they are")
        inner = getattr(inner, "strategy", None)
