"""LoRA factors in Flower's `ArrayRecord`: find them, align them, put them back."""

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


@dataclass(frozen=True)
class Reference:
    """The global factors from which the clients started a round.

    ``record``: all global arrays. ``layers``: by name the keys of ``A`` and of ``B`` in it.
    ``tensors``: the factors by key, as they are stored: ``(r, k)`` and ``(d, r)``, with further
    dimensions for a convolution.
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
                other, or there are more or fewer names than arrays.
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
            key: _tensor(record, key, "the global arrays")
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

    def aggregate(
        self,
        method: FedRot,
        clients: Mapping[str, ArrayRecord],
        weights: Tensor | None = None,
        *,
        round: int,
    ) -> dict[str, Array]:
        """Align the clients with these factors and average them: the new factors by their keys.

        They have the shapes of the global ones and the widest dtype among the layer's factors of
        the clients. A layer at a time, so that no more than that is held as tensors.

        Args:
            clients: by the name that errors give them.
            weights: ``(N,)``, non-negative; ``None`` is uniform.
            round: from 0.

        Raises:
            ValueError: a client lacks a factor, or one has a wrong shape.
            TypeError: a factor is not of floating point.
        """
        for who, record in clients.items():
            self.check_keys(record, who)
        arrays = {}
        for layer, (key_A, key_B) in self.layers.items():
            pairs = [self._pair(record, layer, who) for who, record in clients.items()]
            dtype = reduce(torch.promote_types, (t.dtype for pair in pairs for t in pair))
            uploads = [_factors(layer, pair, dtype) for pair in pairs]
            reference = _factors(layer, (self.tensors[key_A], self.tensors[key_B]), dtype)
            new = method.aggregate(uploads, reference, weights, round=round)
            for key, tensor in ((key_A, new.A[layer]), (key_B, new.B[layer])):
                arrays[key] = Array(tensor.reshape(self.tensors[key].shape).numpy())
        return arrays

    def check_keys(self, record: ArrayRecord, who: str) -> None:
        """Raise `ValueError` unless a client has exactly the global factors."""
        for key in self.tensors:
            if key not in record:
                raise ValueError(f"{who}: {key!r} is missing, there are {_some(record)}")
        if more := [key for key in record if key not in self.tensors and factor_of(key)]:
            raise ValueError(f"{who}: {_some(more)} not among the global arrays")

    def _pair(self, record: ArrayRecord, layer: str, who: str) -> tuple[Tensor, Tensor]:
        key_A, key_B = self.layers[layer]
        A, B = _tensor(record, key_A, who), _tensor(record, key_B, who)
        A_ref, B_ref = self.tensors[key_A], self.tensors[key_B]
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
        return A, B


def _factors(layer: str, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Factors:
    A, B = (t.flatten(1).to(dtype) for t in pair)
    return Factors({layer: A}, {layer: B})


def _tensor(record: ArrayRecord, key: str, who: str) -> Tensor:
    values = record[key].numpy()
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"{who}: {key!r} must be of floating point, got {values.dtype}")
    return torch.from_numpy(values)


def _some(keys: Iterable[str]) -> str:
    """The first few, for an error."""
    names = list(keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(repr, names[:3])) or "none") + more
