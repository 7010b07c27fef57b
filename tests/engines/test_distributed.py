"""Three processes over gloo, started once for all cases; each writes down what it got."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from clients import check, problem, spoiled, tensors
from problems import assert_close

from fedrot import distributed
from fedrot.distributed import align_aggregate
from fedrot.streaming import StreamingAggregator

RANKS = 3
WEIGHTS = [10.0, 20.0, 0.0, 31.0, 7.0]
SHARDS = ([0, 1, 3, 4], [2], [])  # uneven, and a rank with no client


def shard(rank, of=RANKS, **options):
    """``(uploads, reference)`` of a rank."""
    ref, clients, _ = problem(**options)
    mine = SHARDS[rank] if of == RANKS else range(rank, len(clients), of)
    return [(clients[i], WEIGHTS[i]) for i in mine], ref


def broken_training(uploads):
    yield from uploads
    raise KeyError("no data for this client")


def values(rank, groups):
    uploads, ref = shard(rank)
    yield "float32", lambda: align_aggregate(uploads, ref)
    yield "options", lambda: align_aggregate(uploads, ref, lam=1.0, align="A", proper=False)
    low, low_ref = shard(rank, dtype=torch.bfloat16, ranks=[4, 1, 3, 5, 2])
    yield "bfloat16", lambda: align_aggregate(iter(low), low_ref)
    wide, wide_ref = shard(rank, dtype=torch.float64)
    yield "float64", lambda: align_aggregate(wide, wide_ref)
    if rank < 2:
        pair, _ = shard(rank, 2)
        yield "pair", lambda: align_aggregate(pair, ref, group=groups["pair"])
    bad = [*uploads, (spoiled(uploads[0][0], "head", torch.nan), 5.0)] if rank == 1 else uploads
    yield "drop", lambda: align_aggregate(bad, ref, nonfinite="drop")


def errors(rank, groups):
    uploads, ref = shard(rank)
    bad = [*uploads, (spoiled(uploads[0][0], "head", torch.nan), 5.0)] if rank == 1 else uploads
    yield "one client", lambda: align_aggregate(bad, ref)
    stopped = uploads if rank == 0 else broken_training(uploads)
    yield "two ranks", lambda: align_aggregate(stopped, ref)
    yield "weights", lambda: align_aggregate([(c, 0.0) for c, _ in uploads], ref)
    yield "clients", lambda: align_aggregate([], ref)
    yield "options", lambda: align_aggregate(uploads, ref, lam=0.1 * rank)
    other = ref if rank < 2 else problem(seed=1)[0]
    yield "reference", lambda: align_aggregate(uploads, other)
    huge = (
        [(c, w) for c, w in uploads]
        if rank
        else [(type(ref)({n: A * 1e6 for n, A in uploads[0][0].A.items()}, uploads[0][0].B), 1e9)]
    )
    half = type(ref)(*({n: t.half() for n, t in f.items()} for f in (ref.A, ref.B)))
    yield "overflow", lambda: align_aggregate(huge, half)


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the client that is dropped, and of gloo itself
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),  # a rank that waits in vain fails
    )
    groups = {"pair": dist.new_group([0, 1])}
    found = {"values": {}, "errors": {}}
    for name, case in values(rank, groups):
        found["values"][name] = tensors(case())
    for name, case in errors(rank, groups):
        try:
            case()
        except Exception as error:
            cause = error.__cause__
            found["errors"][name] = (type(error).__name__, str(error), type(cause).__name__)
    uploads, ref = shard(rank)
    found["values"]["after all errors"] = tensors(align_aggregate(uploads, ref))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


OPTIONS = {"lam": 1.0, "align": "A", "proper": False}
VALUES = {
    "float32": ({}, {}),
    "options": ({}, OPTIONS),
    "bfloat16": ({"dtype": torch.bfloat16, "ranks": [4, 1, 3, 5, 2]}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "pair": ({}, {}),
    "drop": ({}, {}),
    "after all errors": ({}, {}),
}


@pytest.mark.parametrize("name", VALUES)
def test_all_ranks_get_what_one_process_does(found, name):
    kind, options = VALUES[name]
    ref, clients, inputs = problem(**kind)
    alone = StreamingAggregator(ref, **options)
    for client, weight in zip(clients, WEIGHTS, strict=True):
        alone.accept(client, weight)
    check(alone.finish(), inputs, WEIGHTS, **options)
    for rank in range(2 if name == "pair" else RANKS):
        got = found[rank]["values"][name]
        assert_close(got, tensors(alone.finish()), 1e-6)
        assert all(map(torch.equal, got, found[0]["values"][name]))


ERRORS = {
    "one client": "RuntimeError: rank 1: ValueError: client 1: "
    "lora_B holds a non-finite value for layer head",
    "two ranks": "RuntimeError: rank 1: KeyError: 'no data for this client'; "
    "rank 2: KeyError: 'no data for this client'",
    "weights": "ValueError: weights must have a positive sum, all 5 are zero",
    "clients": "ValueError: there must be at least one client to average",
    "options": "ValueError: every rank must have the same reference, on the same kind of device, "
    "and the same options: rank 1 differs from rank 0",
    "reference": "ValueError: every rank must have the same reference, on the same kind of device, "
    "and the same options: rank 2 differs from rank 0",
    "overflow": "ValueError: the cross-covariance or the result overflows its dtype; "
    "scale the factors down or use a wider dtype",
}
CAUSES = {"one client": {1: "ValueError"}, "two ranks": {1: "KeyError", 2: "KeyError"}}


@pytest.mark.parametrize("name", ERRORS)
def test_every_rank_raises_the_same(found, name):
    for rank in range(RANKS):
        kind, message, cause = found[rank]["errors"][name]
        assert f"{kind}: {message}" == ERRORS[name]
        assert cause == CAUSES.get(name, {}).get(rank, "NoneType")


def test_without_a_group_nobody_is_trained():
    def train():
        raise AssertionError("nothing is read")
        yield

    with pytest.raises(ValueError, match="process group has not been initialized"):
        align_aggregate(train(), problem()[0])


def test_where_the_sum_is_made(monkeypatch):
    """On the device of the reference where the backend works there, else where it does."""
    for backends, device, wanted in (
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda"),
        ("cpu:gloo", "cuda:1", "cpu"),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, found=backends: found)
        assert distributed._reachable(torch.device(device), None) == torch.device(wanted)
