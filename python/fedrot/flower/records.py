"""LoRA factors in Flower's `ArrayRecord`: find them, take them out, put them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedrot.adapters.layers import factor_keys, factor_of
from fedrot.factors import Factors
from fedrot.methods import FedRot

Values = Mapping[str, np.ndarray]  # of a record, decoded


@dataclass(frozen=True)
class Reference:
    """The global arrays from which the clients started a round.

    ``layers``: by name the keys of ``A`` and of ``B`` in ``record``. ``tensors``: the factors by
    key, as they are stored: ``(r, k)`` and ``(d, r)``, with further dimensions for a convolution.
    """

    record: ArrayRecord
    layers: dict[str, tuple[str, str]]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, record: ArrayRecord, names: Sequence[str] | None = None) -> Reference:
        """Find the factors by the names of PEFT's state dicts or parameters.

        ``names``, one for each array in order, where the keys of the record say nothing.

        Raises:
            ValueError: no name is that of a LoRA factor, a layer has one factor without the
                other or a pair that does not fit, or there are more or fewer names than arrays.
            TypeError: a factor is not of floating point.
        """
        if names is not None and len(names) != len(record):
            raise ValueError(f"names must name all {len(record)} arrays, got {len(names)}")
        key_of = dict(zip(names or record, record, strict=True))
        layers = {name: (key_of[A], key_of[B]) for name, (A, B) in factor_keys(key_of).items()}
        if not layers:
            numbered = "; arrays without names need the option names" if "0" in key_of else ""
            raise ValueError(
                "the global arrays have no LoRA factors (...lora_A.weight, ...lora_B.weight), "
                f"only {_some(key_of)}{numbered}"
            )
        tensors = {
            key: _tensor(record[key].numpy(), key, "the global arrays")
            for pair in layers.values()
            for key in pair
        }
        for key_A, key_B in layers.values():
            A, B = tensors[key_A], tensors[key_B]
            if A.ndim < 2 or B.ndim < 2 or B.shape[1] != A.shape[0]:
                raise ValueError(
                    f"{key_A!r} {tuple(A.shape)} and {key_B!r} {tuple(B.shape)} are no pair of "
                    "factors (r, k), (d, r); of grouped convolutions B is block-diagonal, which a "
                    "rotation would fill"
                )
        return cls(record, layers, tensors)

    def factors(self, dtype: torch.dtype) -> Factors:
        """The global factors as matrices."""
        return self._flat(self.tensors, dtype)

    def take(self, values: Values, who: str, dtype: torch.dtype | None = None) -> Factors:
        """A client's factors as matrices, by default of its own dtype, the widest there is.

        Raises:
            ValueError: the client, called ``who``, has not the global factors, or one has a shape
                that does not fit.
            TypeError: a factor is not of floating point.
        """
        for key in self.tensors:
            if key not in values:
                raise ValueError(f"{who}: {key!r} is missing, there are {_some(values)}")
        if more := [key for key in values if key not in self.tensors and factor_of(key)]:
            raise ValueError(f"{who}: {_some(more)} not among the global arrays")
        tensors = {key: _tensor(values[key], key, who) for key in self.tensors}
        for key_A, key_B in self.layers.values():
            self._check_shapes(key_A, key_B, tensors, who)
        own = reduce(torch.promote_types, (t.dtype for t in tensors.values()))
        return self._flat(tensors, dtype or own)

    def rotate(self, method: FedRot, values: Values, who: str, *, round: int) -> dict[str, Array]:
        """A client's factors turned toward the global ones and padded to their rank, by their keys.

        ``round`` counts from 0. Raises what :meth:`take` does.
        """
        client = self.take(values, who)
        dtype = next(iter(client.A.values())).dtype
        return self.put(method.aggregate([client], self.factors(dtype), round=round))

    def put(self, factors: Factors) -> dict[str, Array]:
        """Factors of the global rank as arrays, by their keys."""
        arrays = {}
        for layer, (key_A, key_B) in self.layers.items():
            for key, tensor in ((key_A, factors.A[layer]), (key_B, factors.B[layer])):
                arrays[key] = Array(tensor.reshape(self.tensors[key].shape).numpy())
        return arrays

    def _flat(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        A, B = (
            {layer: tensors[pair[side]].flatten(1).to(dtype) for layer, pair in self.layers.items()}
            for side in (0, 1)
        )
        return Factors(A, B)

    def _check_shapes(
        self, key_A: str, key_B: str, tensors: Mapping[str, Tensor], who: str
    ) -> None:
        A, B, A_ref, B_ref = (t[key] for t in (tensors, self.tensors) for key in (key_A, key_B))
        r = A.shape[0] if A.ndim else 0
        if A.shape[1:] != A_ref.shape[1:] or not 1 <= r <= len(A_ref):
            raise ValueError(
                f"{who}: {key_A!r} has shape {tuple(A.shape)}, the global one {tuple(A_ref.shape)}"
                + ("; a client's rank must not exceed the global one" if r > len(A_ref) else "")
            )
        if B.shape != (B_ref.shape[0], r, *B_ref.shape[2:]):
            raise ValueError(
                f"{who}: {key_B!r} has shape {tuple(B.shape)}, but {key_A!r} has rank {r} and the "
                f"global {key_B!r} shape {tuple(B_ref.shape)}"
            )


def decode(record: ArrayRecord) -> Values:
    return {key: array.numpy() for key, array in record.items()}


def not_finite(values: Values) -> str | None:
    """The first key under which there is a NaN or infinity."""
    for key, array in values.items():
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            return key
    return None


def _tensor(array: np.ndarray, key: str, who: str) -> Tensor:
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{who}: {key!r} must be of floating point, got {array.dtype}")
    return torch.from_numpy(array)


def _some(keys: Iterable[str]) -> str:
    """The first few, for an error."""
    names = list(keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(repr, names[:3])) or "none") + more
