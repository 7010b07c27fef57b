"""What the strategies have in common: the global arrays of a round, and its replies, checked."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fedrot.flower.records import Reference, Values, decode, not_finite

CLIENT_SIDE_CLIPPING = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
)
CLIPPING = (
    *CLIENT_SIDE_CLIPPING,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

logger = logging.getLogger("flwr")


class Rounds(ABC):
    """Options that all strategies have, and the global arrays of the round."""

    def __init__(self, nonfinite: str, rounds_done: int) -> None:
        if nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be raise or drop, got {nonfinite!r}")
        if rounds_done < 0:
            raise ValueError(f"rounds_done must not be negative, got {rounds_done}")
        self.drop = nonfinite == "drop"
        self.rounds_done = rounds_done
        self._reference: Reference | None = None

    @abstractmethod
    def refusal(self, wrapper: type) -> str:
        """Why one of Flower's wrappers that clip must not be around the strategy."""

    def round(self, server_round: int) -> int:
        return server_round + self.rounds_done

    def begin(self, server_round: int, arrays: ArrayRecord) -> int:
        """Keep the arrays: they never reach ``aggregate_train``, and are what to align with."""
        if wrapper := _clipping_around():
            raise ValueError(self.refusal(wrapper))
        self._reference = Reference.of(arrays)
        return self.round(server_round)

    @property
    def reference(self) -> Reference:
        if self._reference is None:
            raise AggregationError("configure_train must come before aggregate_train")
        return self._reference

    def received(self, replies: Iterable[Message]) -> Iterator[tuple[Message, Upload | None]]:
        """Every reply with what it holds, ``None`` for one that is an error, less those dropped.

        Raises:
            ValueError: a client has not one record, or (unless it is dropped) a NaN or infinity.
        """
        for reply in replies:
            if reply.has_error():
                yield reply, None
                continue
            upload = Upload.of(reply)
            if (key := not_finite(upload.values)) is None:
                yield reply, upload
            elif self.drop:
                logger.warning("%s is left out: %r holds a NaN or infinity", upload.who, key)
            else:
                raise ValueError(f"{upload.who}: {key!r} holds a NaN or infinity")

    def rest(self, upload: Upload) -> ArrayRecord:
        """A client's arrays that are no factors."""
        factors = self.reference.tensors
        return ArrayRecord({key: a for key, a in upload.record.items() if key not in factors})

    def together(self, factors: Mapping[str, Array], rest: ArrayRecord) -> ArrayRecord:
        """New factors and the rest as one record, in the order of the global arrays."""
        new = {**factors, **rest}
        in_order = dict.fromkeys([*self.reference.record, *new])
        return ArrayRecord({key: new[key] for key in in_order if key in new})


@dataclass(frozen=True)
class Upload:
    """What one client sent: its name in errors, its only record with its key, decoded."""

    who: str
    key: str
    record: ArrayRecord
    values: Values

    @classmethod
    def of(cls, reply: Message) -> Upload:
        who, records = f"node {reply.metadata.src_node_id}", reply.content.array_records
        if len(records) != 1:
            raise ValueError(f"{who}: the reply must hold one ArrayRecord, got {len(records)}")
        ((key, record),) = records.items()
        return cls(who, key, record, decode(record))


def weight_of(reply: Message, key: str, who: str) -> float:
    """The number under ``key`` in the metrics of a reply.

    Raises:
        ValueError: there is none.
    """
    for measured in reply.content.metric_records.values():
        weight = measured.get(key)
        if isinstance(weight, int | float):
            return float(weight)
    raise ValueError(f"{who}: the reply's metrics have no number {key!r}")


def _clipping_around() -> type | None:
    """The wrapper that clips and has called this strategy, if there is one.

    A strategy does not get to know what it was put into, so the stack has to tell.
    """
    frame = inspect.currentframe()
    while frame := frame.f_back if frame else None:
        if isinstance(caller := frame.f_locals.get("self"), CLIPPING):
            return type(caller)
    return None
