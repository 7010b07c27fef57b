"""The Dirichlet split: a partition, never an empty client, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrot.errors import FedrotError
from fedrot.tasks.partition import dirichlet


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    share=st.floats(0, 1),
    alpha=st.sampled_from([1e-4, 0.1, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_is_a_partition_without_empty_clients(labels, share, alpha, seed):
    clients = 1 + int(share * (len(labels) - 1))
    parts = dirichlet(torch.tensor(labels), clients, alpha, seed)
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    again = dirichlet(torch.tensor(labels), clients, alpha, seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_seed_changes_the_split():
    labels = torch.arange(500) % 5
    a, b = (dirichlet(labels, 10, 0.5, seed) for seed in (0, 1))
    assert [len(p) for p in a] != [len(p) for p in b]


def test_alpha_sets_how_uneven_clients_are():
    labels = torch.arange(5000) % 5

    def largest_share(alpha: float) -> float:
        parts = dirichlet(labels, 10, alpha, 0)
        counts = torch.stack([torch.bincount(labels[p], minlength=5) for p in parts]).double()
        return float((counts.max(1).values / counts.sum(1)).mean())

    assert largest_share(1000.0) < 0.25  # 0.2 is exactly even
    assert largest_share(0.05) > 0.7


def test_more_clients_than_examples():
    with pytest.raises(FedrotError, match=r"clients\.count is 4, but there are 3 examples"):
        dirichlet(torch.tensor([0, 1, 1]), 4, 0.5, 0)
