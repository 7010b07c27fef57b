"""How far apart adapters are, and what averaging loses with and without alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrot.adapters.uploads import Uploads, delta
from fedrot.factors import Factors
from fedrot.methods import FedIT, FedRot, Method, Robust
from fedrot.metrics import aggregation_error, rotation_angles, total
from fedrot_kernels import ALIGN_MODES


@dataclass(frozen=True)
class Misalignment:
    """Rotation angles, and aggregation errors `||sum_i w_i dW_i - dW||_F`, with `dW = s B A`.

    A layer of several experts counts as one: the mean of their angles, the norm of all together.
    """

    angles: Tensor  # (N, L), degrees
    plain: dict[str, float]  # error of factor averaging (FedIT), by layer
    aligned: dict[str, float]  # error of the method, by layer
    norm: dict[str, float]  # ||sum_i w_i dW_i||_F, by layer

    def summary(self) -> dict[str, float | None]:
        """Over all layers: mean angle, the two errors, and both relative to the norm."""
        norm, plain, aligned = total(self.norm), total(self.plain), total(self.aligned)
        return {
            "mean_angle": float(self.angles.mean()),
            "norm": norm,
            "error_plain": plain,
            "error_aligned": aligned,
            "relative_plain": plain / norm if norm else None,
            "relative_aligned": aligned / norm if norm else None,
        }


def measure(uploads: Uploads, method: Method, aligned: Factors | None = None) -> Misalignment:
    """Compare `method` with plain averaging; `aligned` is its result where that is known.

    The angles are those of the rotations that `method` fits, if it does, else of the joint ones.
    """
    if aligned is None:
        aligned = method.aggregate(uploads.clients, uploads.reference, uploads.weights)
    plain = FedIT().aggregate(uploads.clients, uploads.reference, uploads.weights)
    scaled = [delta(client, uploads.scalings) for client in uploads.clients]
    rotation = method if isinstance(method, FedRot | Robust) else FedRot()
    align = rotation.align if rotation.align in ALIGN_MODES else "joint"
    angles = rotation_angles(uploads.clients, uploads.reference, align, rotation.proper)
    pairs = [len(layer.pairs) for layer in uploads.target.keys.layers.values()]
    return Misalignment(
        torch.stack([part.mean(1) for part in angles.split(pairs, 1)], 1),
        _errors(scaled, plain, uploads),
        _errors(scaled, aligned, uploads),
        _errors(scaled, _zeros(uploads.reference), uploads),
    )


def _errors(scaled: Sequence[Factors], aggregate: Factors, uploads: Uploads) -> dict[str, float]:
    errors = aggregation_error(scaled, delta(aggregate, uploads.scalings), uploads.weights)
    layers = uploads.target.keys.layers
    return {name: total({p: errors[p] for p in layer.pairs}) for name, layer in layers.items()}


def _zeros(factors: Factors) -> Factors:
    return Factors(
        {name: torch.zeros_like(A) for name, A in factors.A.items()},
        {name: torch.zeros_like(B) for name, B in factors.B.items()},
    )
