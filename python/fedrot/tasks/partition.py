"""How the examples of a task are split between the clients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedrot.errors import FedrotError


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Split examples so that every label is spread over the clients by a Dirichlet draw.

    Small ``alpha`` gives each client few labels, large ``alpha`` even ones (Hsu et al.,
    arXiv 1909.06335). A client left without examples takes one from the largest client.

    Args:
        labels: ``(n,)`` integers.
        clients: number of parts, at most ``n``.
        alpha: concentration, positive.
        seed: the same seed gives the same split.

    Returns:
        per client the sorted indices of its examples: disjoint, non-empty, together all ``n``.

    Raises:
        FedrotError: there are more clients than examples.
    """
    if clients > len(labels):
        raise FedrotError(f"clients.count is {clients}, but there are {len(labels)} examples")
    rng = np.random.default_rng([seed, 1])
    owners = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels.numpy()):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        # alpha near 0 underflows to 0/0 in numpy's draw: one client then takes the label.
        shares = rng.dirichlet(np.full(clients, alpha))
        if not np.isfinite(shares).all():
            shares = np.eye(clients)[rng.integers(clients)]
        cuts = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        owners[members] = np.searchsorted(cuts, np.arange(len(members)), side="right").clip(
            max=clients - 1
        )
    _fill_empty(owners, clients, rng)
    return [torch.from_numpy(np.flatnonzero(owners == client)) for client in range(clients)]


def _fill_empty(owners: np.ndarray, clients: int, rng: np.random.Generator) -> None:
    counts = np.bincount(owners, minlength=clients)
    for client in np.flatnonzero(counts == 0):
        largest = int(np.bincount(owners, minlength=clients).argmax())
        owners[rng.choice(np.flatnonzero(owners == largest))] = client
