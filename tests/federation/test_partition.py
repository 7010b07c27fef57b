"""Every split is a partition without empty clients, the same for the same seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrot.config import Clients, load
from fedrot.errors import FedrotError
from fedrot.simulation.data import divide
from fedrot.tasks import TaskData
from fedrot.tasks.partition import dirichlet, hold_out, like, split


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


def data_of(labels, **columns):
    return TaskData(Path("nowhere"), {}, {}, labels, {}, columns)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), kinds=st.integers(1, 6), count=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_every_partition_is_one(n, kinds, count, seed):
    labels = torch.arange(kinds * n) % kinds
    data = data_of(labels, user=torch.arange(kinds * n) % min(count, kinds * n))
    each = max(1, -(-kinds // count))
    for kind in ("iid", "dirichlet", "labels", "column"):
        clients = Clients(count=count, partition=kind, labels=each, column="user")
        if count > len(labels) or (kind == "labels" and count * each > n * kinds):
            continue
        try:
            parts = split(data, clients, seed)
        except FedrotError as error:
            assert "examples for" in str(error) and kind == "labels"
            continue
        assert len(parts) == count and all(len(part) for part in parts)
        assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
        assert all(torch.equal(part, part.sort().values) for part in parts)
        again = split(data, clients, seed)
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_validation_takes_the_place_of_the_test_part():
    """Other examples for another seed; labels and columns are those of the rows that are left."""
    rows = torch.arange(42)
    part = {"row": rows, "labels": rows % 4}
    data = TaskData(Path("nowhere"), part, part, rows % 4, {}, {"user": rows})
    held = []
    for seed in (0, 1):
        clients = {"count": 4, "partition": "iid"}
        config = load({"seed": seed, "validation": 0.25, "clients": clients})
        found, examples, _ = divide(data, config)
        held.append(found.test["row"].tolist())
        assert sorted([*held[-1], *found.train["row"].tolist()]) == rows.tolist()
        assert len(held[-1]) == 10 and sum(map(len, examples)) == 32  # 10.5 rounds to even
        assert torch.equal(found.labels, found.train["row"] % 4)
        assert torch.equal(found.columns["user"], found.train["row"])
    assert held[0] != held[1]


def test_iid_is_even_and_random():
    data, clients = data_of(torch.arange(1003) % 2), Clients(count=10, partition="iid")
    parts = split(data, clients, 0)
    assert {len(part) for part in parts} == {100, 101}
    assert not torch.equal(parts[0], split(data, clients, 1)[0])
    assert all(0.3 < float(data.labels[part].double().mean()) < 0.7 for part in parts)


def test_the_seed_deals_other_labels():
    data, clients = data_of(torch.arange(600) % 6), Clients(count=6, partition="labels")
    dealt = {tuple(int(data.labels[p[0]]) for p in split(data, clients, s)) for s in range(4)}
    assert len(dealt) > 1


@pytest.mark.parametrize("each", [1, 2, 3])
def test_label_sets(each):
    labels = torch.arange(600) % 6
    parts = split(data_of(labels), Clients(count=8, partition="labels", labels=each), 0)
    sets = [labels[part].unique().tolist() for part in parts]
    assert [len(s) for s in sets] == [each] * 8
    holders = [sum(label in s for s in sets) for label in range(6)]
    assert max(holders) - min(holders) <= 1
    if each == 1:  # two of the six labels have two clients, with half of the examples each
        assert sorted(len(part) for part in parts) == [50, 50, 50, 50, 100, 100, 100, 100]


def test_one_client_per_value_of_a_column():
    user = torch.tensor([7, 3, 7, 9, 3])
    data = data_of(torch.zeros(5, dtype=torch.long), user=user)
    parts = split(data, Clients(count=3, partition="column", column="user"), 0)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (Clients(count=6), "clients.count is 6, but there are 5 examples"),
        (Clients(count=2, partition="column"), r"column of the task \(user\), got None"),
        (Clients(count=2, partition="column", column="user"), "has 3 values, one client each"),
        (Clients(count=2, partition="labels", labels=9), "clients.labels is 9, but there are 5"),
        (Clients(count=2, partition="labels", labels=2), "2 clients need at least 3 each"),
        (Clients(count=5, partition="labels", labels=2), "has 1 examples for 2 clients"),
    ],
)
def test_what_a_partition_refuses(clients, message):
    data = data_of(torch.arange(5), user=torch.tensor([7, 3, 7, 9, 3]))
    with pytest.raises(FedrotError, match=message):
        split(data, clients, 0)


@pytest.mark.parametrize(
    ("labels", "test", "rows"),
    [
        ([0, 0, 0, 1], [1, 0, 0, 1, 1, 0], [0, 1, 2, 5]),  # 3 : 1, of three and three
        ([2, 2], [0, 2, 1, 2], [1, 3]),
        ([0, 1, 3, 3], [1, 0, 1, 0], [0, 1, 2, 3]),  # no 3 there: the shares of the others
        ([5], [0, 1], []),
        ([0] * 99 + [1], [1, 0, 1], [1]),  # the rare one is less than half an example
    ],
)
def test_as_many_test_examples_as_there_are_in_the_same_shares(labels, test, rows):
    assert like(torch.tensor(labels), torch.tensor(test)).tolist() == rows


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=80),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_what_is_held_out_leaves_one_of_everything(values, share, seed):
    groups = [torch.tensor(column) for column in zip(*values, strict=True)]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    count = int(share * len(values))
    assert hold_out(order, count, [], "x")[0].tolist() == sorted(order[:count].tolist())
    try:
        held, kept = hold_out(order, count, groups, "x=1")
    except FedrotError as error:  # with one more, something would have no other
        most = int(re.search(r"are \d+, and (\d+) can", str(error))[1])
        assert str(error).startswith(f"x=1 of {len(values)} examples are {count}") and most < count
        held, kept = hold_out(order, most, groups, "x=1")
        for i in kept.tolist():
            assert any(int((group[kept] == group[i]).sum()) == 1 for group in groups)
    assert sorted([*held.tolist(), *kept.tolist()]) == [*range(len(values))]
    assert held.tolist() == sorted(held.tolist()) and kept.tolist() == sorted(kept.tolist())
    for group in groups:
        assert {*group[kept].tolist()} == {*group.tolist()}
