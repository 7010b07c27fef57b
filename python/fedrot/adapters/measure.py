"""How far apart adapters are, and what averaging loses with and without alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrot.adapters.uploads import Uploads
from fedrot.factors import Factors
from fedrot.methods import FedIT, FedRot, Method, Robust
from fedrot.methods.energy import singular_values
from fedrot.metrics import aggregation_error, rotation_angles, total
from fedrot_kernels import ALIGN_MODES


@dataclass(frozen=True)
class Misalignment:
    """Rotation angles, and aggregation errors `||sum_i w_i dW_i - dW||_F`, with `dW = s B A`.

    A layer of several experts counts as one: the mean of their angles (and `lam`), the norm of all
    together.
    """

    angles: Tensor  # (N, L), degrees
    plain: dict[str, float]  # error of factor averaging (FedIT), by layer
    aligned: dict[str, float]  # error of the method, by layer
    bound: dict[str, float]  # the least error of any product of the rank of the result, by layer
    norm: dict[str, float]  # ||sum_i w_i dW_i||_F, by layer
    lam: Tensor | None = None  # what was taken for "auto" (1, L), for "auto-client" (N, L)

    def by_layer(self) -> dict[str, dict[str, Any]]:
        """Norm and errors of each layer; with `lam="auto"` the value taken, with `"auto-client"`
        those of the clients in their order."""
        kinds = ("norm", "plain", "aligned", "bound")
        layers = {name: {kind: getattr(self, kind)[name] for kind in kinds} for name in self.norm}
        if self.lam is not None:
            for layer, lam in zip(layers.values(), self.lam.T.tolist(), strict=True):
                layer["lam"] = lam[0] if len(lam) == 1 else lam
        return layers

    def summary(self) -> dict[str, float | None]:
        """Over all layers: mean angle, the two errors, their bound, and all relative to the
        norm."""
        norm, plain, aligned = total(self.norm), total(self.plain), total(self.aligned)
        bound = total(self.bound)
        return {
            "mean_angle": float(self.angles.mean()),
            "norm": norm,
            "error_plain": plain,
            "error_aligned": aligned,
            "error_bound": bound,
            "relative_plain": plain / norm if norm else None,
            "relative_aligned": aligned / norm if norm else None,
            "relative_bound": bound / norm if norm else None,
        }


def measure(
    uploads: Uploads,
    method: Method,
    aligned: Factors | None = None,
    lam: Tensor | None = None,
) -> Misalignment:
    """Compare `method` with plain averaging; `aligned` is its result where that is known, and
    `lam` what it found for "auto".

    The angles are those of the rotations that `method` fits, if it does, else of the joint ones.
    """
    if aligned is None:
        aligned, lam = method.aggregate_with_lam(
            uploads.clients, uploads.reference, uploads.weights
        )
    plain = FedIT().aggregate(uploads.clients, uploads.reference, uploads.weights)
    rotation = method if isinstance(method, FedRot | Robust) else FedRot()
    align = rotation.align if rotation.align in ALIGN_MODES else "joint"
    angles = rotation_angles(uploads.clients, uploads.reference, align, rotation.proper)
    values = singular_values(uploads.clients, uploads.weights, rounding=True)
    beyond = {pair: float(v[aligned.A[pair].shape[0] :].norm()) for pair, v in values.items()}
    return Misalignment(
        _layer_means(angles, uploads),
        _errors(plain, uploads),
        _errors(aligned, uploads),
        _by_layer(beyond, uploads),
        _by_layer({pair: float(v.norm()) for pair, v in values.items()}, uploads),
        None if lam is None else _layer_means(lam.T, uploads),
    )


def _errors(aggregate: Factors, uploads: Uploads) -> dict[str, float]:
    return _by_layer(aggregation_error(uploads.clients, aggregate, uploads.weights), uploads)


def _by_layer(norms: Mapping[str, float], uploads: Uploads) -> dict[str, float]:
    """Norms of products of the factors of pairs as those of the updates of layers."""
    layers, scalings = uploads.target.keys.layers, uploads.scalings
    return {
        name: total({p: scalings[p] * norms[p] for p in layer.pairs})
        for name, layer in layers.items()
    }


def _layer_means(of_pairs: Tensor, uploads: Uploads) -> Tensor:
    """`(N, pairs)` as `(N, L)`."""
    pairs = [len(layer.pairs) for layer in uploads.target.keys.layers.values()]
    return torch.stack([part.mean(1) for part in of_pairs.split(pairs, 1)], 1)
