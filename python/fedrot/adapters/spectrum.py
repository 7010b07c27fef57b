"""What adapters average to, direction by direction, and the ranks that hold most of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrot.adapters.uploads import Uploads
from fedrot.errors import FedrotError
from fedrot.methods.energy import check_energy, rank_for, singular_values
from fedrot.metrics import total

ENERGY = 0.95


@dataclass(frozen=True)
class Spectrum:
    """Singular values of `sum_i w_i dW_i`, `dW = s B A`, of each layer, and the ranks they give.

    A layer of several experts counts as one, since all have the same rank: its values are the root
    of the sum of their squares over the experts.
    """

    values: dict[str, Tensor]  # (n,), float64, descending, n the numerical rank; by layer
    ranks: dict[str, int]  # the smallest that hold `energy`; 1 for an update of zero
    energy: float

    def kept(self, ranks: Mapping[str, int]) -> float:
        """Share of the squared singular values of these layers, all together, that ranks keep."""
        lost = total({name: float(self.values[name][rank:].norm()) for name, rank in ranks.items()})
        norm = total({name: float(self.values[name].norm()) for name in ranks})
        return 1 - (lost / norm) ** 2 if norm else 1.0

    def summary(self) -> dict[str, Any]:
        """The share asked for, the share kept over all layers together, and the ranks."""
        return {"energy": self.energy, "kept": self.kept(self.ranks), "ranks": self.ranks}


def measure_spectrum(uploads: Uploads, energy: float | None = None) -> Spectrum:
    """The spectrum of the exact average, and the rank of each layer for a share of its energy.

    Args:
        energy: in (0, 1]; 1 is the numerical rank. None: `ENERGY`.

    Raises:
        FedrotError: `energy` is out of its range, or the adapters are not LoRA.
    """
    energy = ENERGY if energy is None else energy
    if uploads.target.kind is not None:
        uploads.target.kind.check_rank(energy=energy)
    try:
        check_energy(energy)
    except ValueError as error:
        raise FedrotError(str(error)) from None
    found, scalings = singular_values(uploads.clients, uploads.weights), uploads.scalings
    layers = uploads.target.keys.layers
    values = {
        name: _together([scalings[p] * found[p] for p in layer.pairs])
        for name, layer in layers.items()
    }
    ranks = {name: rank_for(v, energy) for name, v in values.items()}
    # Pairs of keys of which the configuration cannot say which parameter they adapt share one rank.
    shared: dict[tuple[str, ...], int] = {}
    for name, layer in layers.items():
        shared[layer.targets] = max(ranks[name], shared.get(layer.targets, 0))
    return Spectrum(values, {n: shared[layer.targets] for n, layer in layers.items()}, energy)


def _together(values: list[Tensor]) -> Tensor:
    squares = torch.zeros(max(len(v) for v in values), dtype=torch.float64)
    for v in values:
        squares[: len(v)] += v.square()
    return squares.sqrt()
