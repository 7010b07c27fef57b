"""How the examples of a task are split between the clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedrot.errors import FedrotError
from fedrot.tasks.base import TaskData

if TYPE_CHECKING:
    from fedrot.config import Clients


def split(data: TaskData, clients: Clients, seed: int) -> list[Tensor]:
    """Per client the sorted indices of its training examples, as ``clients.partition`` says."""
    labels, count = data.labels, clients.count
    if count > len(labels):
        raise FedrotError(f"clients.count is {count}, but there are {len(labels)} examples")
    if clients.partition == "iid":
        return iid(len(labels), count, seed)
    if clients.partition == "labels":
        return by_labels(labels, count, clients.labels, seed)
    if clients.partition == "column":
        if clients.column not in data.columns:
            known = ", ".join(data.columns) or "none"
            raise FedrotError(
                f"clients.column must name a column of the task ({known}), got {clients.column!r}"
            )
        return by_column(data.columns[clients.column], count)
    return dirichlet(labels, count, clients.alpha, seed)


def hold_out(
    order: Tensor, count: int, groups: Sequence[Tensor], option: str
) -> tuple[Tensor, Tensor]:
    """The first ``count`` examples of a random ``order``, and all others, both sorted; but of every
    value in each of ``groups``, integers ``(n,)``, the last example is never held out: there would
    be a client, or a label, without any.

    Raises:
        FedrotError: there are not so many, ``option`` asks for too much.
    """
    left = [(group.tolist(), torch.bincount(group).tolist()) for group in groups]
    held: list[int] = []
    for i in order.tolist():
        if len(held) == count:
            break
        if all(counts[values[i]] > 1 for values, counts in left):
            held.append(i)
            for values, counts in left:
                counts[values[i]] -= 1
    if len(held) < count:
        raise FedrotError(
            f"{option} of {len(order)} examples are {count}, and {len(held)} can be held out with "
            "an example left of every label and client"
        )
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[held] = False
    return (~kept).nonzero().flatten(), kept.nonzero().flatten()


def split_test(data: TaskData, parts: Sequence[Tensor]) -> list[Tensor]:
    """Per client the sorted indices of test examples with its own mix of labels: as many as there
    are in these shares, so that clients share examples.

    Raises:
        FedrotError: the test examples have no classes, or a client none of whose labels are there.
    """
    labels, test = data.train["labels"], data.test["labels"]
    if labels.dim() > 1:
        raise FedrotError(
            "clients.local_test=true takes test examples by their classes, and this task has none"
        )
    found = []
    for client, part in enumerate(parts):
        rows = like(labels[part], test)
        if not len(rows):
            raise FedrotError(
                f"clients.local_test=true: no test example has a label of client {client}"
            )
        found.append(rows)
    return found


def like(labels: Tensor, test: Tensor) -> Tensor:
    """Sorted indices into ``test`` of the first examples of every label, as many as there can be in
    the shares of ``labels``; labels that ``test`` does not have are left out. Both ``(n,)``
    integers from 0."""
    classes = int(torch.cat([labels, test]).max()) + 1
    have = test.bincount(minlength=classes)
    shares = labels.bincount(minlength=classes).double() * (have > 0)
    if not shares.any():
        return torch.empty(0, dtype=torch.long)
    shares /= shares.sum()
    size = torch.where(shares > 0, have / shares, math.inf).min()
    wanted = (size * shares).round().long()
    rows = [(test == c).nonzero().flatten()[:n] for c, n in enumerate(wanted.tolist())]
    return torch.cat(rows).sort().values


def iid(n: int, clients: int, seed: int) -> list[Tensor]:
    """A random split of ``n`` examples into parts whose sizes differ by one at most."""
    order = np.random.default_rng([seed, 2]).permutation(n)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def by_labels(labels: Tensor, clients: int, each: int, seed: int) -> list[Tensor]:
    """Every client gets the examples of ``each`` different labels (McMahan et al., arXiv
    1602.05629); clients that share a label share its examples evenly.

    Labels are dealt in a random order, from the first again when they run out, so that all are
    dealt about equally often.

    Raises:
        FedrotError: there are fewer labels than ``each``, some would be dealt to nobody, or a
            label has fewer examples than clients.
    """
    found = np.unique(labels.numpy())
    if each > len(found):
        raise FedrotError(f"clients.labels is {each}, but there are {len(found)} labels")
    if each * clients < len(found):
        needed = -(-len(found) // clients)
        raise FedrotError(
            f"clients.labels={each} leaves out labels: {clients} clients need at least {needed} "
            f"each for {len(found)} labels"
        )
    rng = np.random.default_rng([seed, 3])
    order = rng.permutation(found)
    owners: dict[int, list[int]] = {}
    for i in range(clients * each):  # `each` labels in a row differ, as each <= len(order)
        owners.setdefault(int(order[i % len(order)]), []).append(i // each)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in found:
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        sharing = owners[int(label)]
        if len(members) < len(sharing):
            raise FedrotError(
                f"clients.labels={each}: label {label} has {len(members)} examples for "
                f"{len(sharing)} clients"
            )
        for client, piece in zip(sharing, np.array_split(members, len(sharing)), strict=True):
            parts[client].append(piece)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def by_column(values: Tensor, clients: int) -> list[Tensor]:
    """One client per distinct value, in the order of the values.

    Raises:
        FedrotError: there are not as many clients as values.
    """
    found = values.unique()
    if len(found) != clients:
        raise FedrotError(
            f"clients.column has {len(found)} values, one client each: set "
            f"clients.count={len(found)}, got {clients}"
        )
    return [(values == value).nonzero().flatten() for value in found]


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Split examples so that every label is spread over the clients by a Dirichlet draw.

    Small ``alpha`` gives each client few labels, large ``alpha`` even ones (Yurochkin et al.,
    arXiv 1905.12022). A client left without examples takes one from the largest client.

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
