"""FedRot and FedRotAvg: values by hand, what passes through, what is refused."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from in_process import InProcess, node, one_round, record, values

import fedrot_kernels  # noqa: F401
from fedrot.flower import FedRot, FedRotAvg

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
EYE = np.eye(2, dtype=np.float32)
QUARTER = np.array([[0, -1], [1, 0]], dtype=np.float32)  # a turn by 90 degrees
EIGHTH = np.array([[1, -1], [1, 1]], dtype=np.float32) / np.sqrt(2).astype(np.float32)

BOTH = pytest.mark.parametrize(
    "make", [lambda **o: FedRot(FedAvg(), **o), FedRotAvg], ids=["around", "fused"]
)


def turned(a: float, b: float, R: np.ndarray, **more: object):
    """A client with the factors `a I`, `b I`, in the basis that `R` turns into the global one."""
    return lambda arrays: {**more, A: a * R, B: b * R.T}


@BOTH
def test_two_clients_by_hand(make):
    """Client 1 is `2 I`, `I`, turned by 90 degrees; client 2 is `4 I`, `4 I` and counts thrice."""
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE), 3)})
    arrays, metrics = one_round(make(lam=1.0), grid, record({A: EYE, B: EYE}))
    np.testing.assert_allclose(arrays[A], 3.5 * EYE, atol=1e-6)
    np.testing.assert_allclose(arrays[B], 3.25 * EYE, atol=1e-6)
    assert arrays[A].dtype == arrays[B].dtype == np.float32
    assert dict(metrics) == {"loss": 2.5}


@BOTH
def test_half_a_rotation_by_hand(make):
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE))})
    arrays, _ = one_round(make(lam=0.5), grid, record({A: EYE, B: EYE}))
    np.testing.assert_allclose(arrays[A], (2 * EIGHTH + 4 * EYE) / 2, atol=1e-6)
    np.testing.assert_allclose(arrays[B], (EIGHTH.T + 4 * EYE) / 2, atol=1e-6)


@BOTH
def test_alternate_counts_from_flowers_first_round(make):
    """Only `A` is turned: fitted to `A` both factors turn, fitted to `B` none."""
    both = {1: node(lambda _: {A: QUARTER, B: EYE}), 2: node(lambda _: {A: QUARTER, B: EYE})}
    grid, start = InProcess(both), record({A: EYE, B: EYE})
    plain, fitted_to_A = (QUARTER, EYE), (EYE, QUARTER)
    strategy = make(lam=1.0, align="alternate")
    for round, expected in ((1, plain), (2, fitted_to_A), (3, plain), (4, fitted_to_A)):
        arrays, _ = one_round(strategy, grid, start, round)
        np.testing.assert_allclose((arrays[A], arrays[B]), expected, atol=1e-6)
    later = make(lam=1.0, align="alternate", rounds_done=3)
    arrays, _ = one_round(later, grid, start, 1)
    np.testing.assert_allclose((arrays[A], arrays[B]), fitted_to_A, atol=1e-6)
    assert grid.sent[-1].content["config"]["server-round"] == 4


def draw(seed: int, ranks: list[int], layers: int = 3, r: int = 4):
    """Global arrays with a head, and clients' of some ranks and weights."""
    rng = np.random.default_rng(seed)

    def one(rank: int):
        arrays = {"base_model.model.head.weight": rng.normal(size=(3, 5))}
        for i in range(layers):
            arrays[f"base_model.model.{i}.lora_A.weight"] = rng.normal(size=(rank, 6 + i))
            arrays[f"base_model.model.{i}.lora_B.weight"] = rng.normal(size=(5, rank))
        return {key: value.astype(np.float32) for key, value in arrays.items()}

    return one(r), [one(rank) for rank in ranks]


@BOTH
@pytest.mark.parametrize("ranks", [[4, 4, 4], [4, 2, 1]], ids=["one rank", "mixed ranks"])
def test_same_as_the_operator(make, ranks):
    """Every layer by `align_aggregate`; the head by the plain mean."""
    start, clients = draw(0, ranks)
    weights = [5, 1, 3]
    apps = {
        i: node(lambda _, c=c: c, w)
        for i, (c, w) in enumerate(zip(clients, weights, strict=True), 1)
    }
    strategy = make(lam=0.7, align="B", proper=False)
    arrays, _ = one_round(strategy, InProcess(apps), record(start))

    keys = [key for key in start if "lora_A" in key], [key for key in start if "lora_B" in key]
    lora = [[torch.from_numpy(c[key]) for c in clients for key in side] for side in keys]
    ref = [[torch.from_numpy(start[key]) for key in side] for side in keys]
    expected = torch.ops.fedrot.align_aggregate(
        *lora, *ref, torch.tensor(weights), lam=0.7, align="B", proper=False
    )
    for side, tensors in zip(keys, expected, strict=True):
        for key, tensor in zip(side, tensors, strict=True):
            np.testing.assert_allclose(arrays[key], tensor, atol=2e-6)
    head = "base_model.model.head.weight"
    mean = np.average([c[head] for c in clients], axis=0, weights=weights)
    np.testing.assert_allclose(arrays[head], mean, atol=1e-6)
    assert list(arrays) == list(start)


def test_around_a_strategy_that_takes_no_mean():
    """The median of rotated clients is what they have in common; that of the others is none."""
    turns = [EYE, QUARTER, -EYE, QUARTER.T, EIGHTH]
    grid = InProcess({i: node(turned(2, 3, R)) for i, R in enumerate(turns, 1)})
    start = record({A: EYE, B: EYE})
    arrays, _ = one_round(FedRot(FedMedian(), lam=1.0), grid, start)
    np.testing.assert_allclose(arrays[B] @ arrays[A], 6 * EYE, atol=1e-5)
    plain, _ = one_round(FedMedian(), grid, start)
    assert np.abs(plain[B] @ plain[A] - 6 * EYE).max() > 3


@pytest.mark.parametrize("kind", ["embedding", "convolution", "parameter names"])
def test_other_layers_and_names(kind):
    """An adapter over an embedding, a convolution, and names with the adapter's in them."""
    key_A, key_B, shape_A, shape_B = {
        "embedding": ("e.lora_embedding_A", "e.lora_embedding_B", (2, 2), (2, 2)),
        "convolution": ("c.lora_A.weight", "c.lora_B.weight", (2, 1, 2, 1), (2, 2, 1, 1)),
        "parameter names": ("q.lora_A.mine.weight", "q.lora_B.mine.weight", (2, 2), (2, 2)),
    }[kind]

    def upload(_):
        return {key_A: (2 * QUARTER).reshape(shape_A), key_B: QUARTER.T.reshape(shape_B)}

    start = record({key_A: EYE.reshape(shape_A), key_B: EYE.reshape(shape_B)})
    grid = InProcess({1: node(upload), 2: node(upload)})
    for strategy in (FedRot(FedAvg(), lam=1.0), FedRotAvg(lam=1.0)):
        arrays, _ = one_round(strategy, grid, start)
        np.testing.assert_allclose(arrays[key_A], (2 * EYE).reshape(shape_A), atol=1e-6)
        np.testing.assert_allclose(arrays[key_B], EYE.reshape(shape_B), atol=1e-6)


@BOTH
def test_failed_and_missing_replies(make, caplog):
    """A client that fails is left out, as by Flower's own strategies; so is one that is late."""

    def broken(arrays):
        raise RuntimeError("out of memory")

    apps = {1: node(turned(2, 2, QUARTER)), 2: node(broken), 3: node(turned(4, 4, EYE))}
    grid, strategy = InProcess(apps), make(lam=1.0)
    start = record({A: EYE, B: EYE})
    with caplog.at_level(logging.INFO, logger="flwr"):
        arrays, _ = one_round(strategy, grid, start)
    np.testing.assert_allclose(arrays[A], 3 * EYE, atol=1e-6)
    assert "Received error in reply from node 2: out of memory" in caplog.text

    messages = list(strategy.configure_train(2, start, ConfigRecord(), grid))
    replies = [r for r in grid.send_and_receive(messages) if r.metadata.src_node_id == 3]
    arrays, _ = strategy.aggregate_train(2, iter(replies))
    np.testing.assert_allclose(values(arrays)[A], 4 * EYE, atol=1e-6)
    assert strategy.aggregate_train(2, []) == (None, None)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [A, "base_model.model.head.weight"], ids=["factor", "head"])
def test_values_that_are_not_finite(make, bad, where, caplog):
    head = "base_model.model.head.weight"
    sick = {A: EYE, B: EYE, head: EYE}
    sick[where] = np.array([[1, bad], [0, 1]], dtype=np.float32)
    apps = {1: node(turned(2, 2, QUARTER, **{head: EYE})), 2: node(lambda _: sick)}
    start = record({A: EYE, B: EYE, head: EYE})
    with pytest.raises(ValueError, match=f"node 2: '{where}' holds a NaN or infinity"):
        one_round(make(), InProcess(apps), start)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        arrays, _ = one_round(make(lam=1.0, nonfinite="drop"), InProcess(apps), start)
    np.testing.assert_allclose(arrays[A], 2 * EYE, atol=1e-6)
    assert f"node 2 is left out: '{where}' holds a NaN or infinity" in caplog.text
    only = InProcess({2: apps[2], 3: apps[2]})
    assert one_round(make(nonfinite="drop"), only, start) == (None, None)


@BOTH
@pytest.mark.parametrize(
    "upload, message",
    [
        ({A: EYE}, f"node 2: '{B}' is missing, there are '{A}'"),
        ({A: EYE, B: EYE, "x.lora_A.weight": EYE}, "node 2: 'x.lora_A.weight' .* global"),
        ({A: np.ones((3, 2)), B: np.ones((2, 3))}, r"node 2: .*\(3, 2\).* rank must not exceed"),
        ({A: np.ones((2, 3)), B: EYE}, r"node 2: .*\(2, 3\), the global one \(2, 2\)"),
        ({A: np.ones((1, 2)), B: EYE}, r"node 2: .*\(2, 2\), but .* has rank 1"),
        ({A: np.ones((2, 2), int), B: EYE}, "node 2: .* must be of floating point, got int64"),
    ],
    ids=["no B", "more layers", "larger rank", "other width", "other ranks", "integers"],
)
def test_uploads_that_do_not_fit(make, upload, message):
    grid = InProcess({1: node(turned(1, 1, EYE)), 2: node(lambda _: upload)})
    with pytest.raises((ValueError, TypeError), match=message):
        one_round(make(), grid, record({A: EYE, B: EYE}))


@BOTH
@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"w": EYE}, "no LoRA factors .* only 'w'"),
        ({}, "no LoRA factors .* only none"),
        ({"0": EYE, "1": EYE}, "arrays without names need the option names"),
        ({A: EYE, "w": EYE}, f"'{A}' has no factor B"),
        ({A: np.ones((4, 2)), B: np.ones((8, 2))}, "no pair of factors"),
    ],
    ids=["none", "empty", "numbered", "half a pair", "grouped"],
)
def test_global_arrays_without_factors(make, arrays, message):
    """Found before anything is sent."""
    grid = InProcess({1: node(dict), 2: node(dict)})
    with pytest.raises(ValueError, match=message):
        make().configure_train(1, record(arrays), ConfigRecord(), grid)


@BOTH
def test_options(make):
    for option, message in (
        ({"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        ({"align": "gpa"}, "align must be joint, A, B or alternate, got 'gpa'"),
        ({"lam": "auto"}, "lam must be a number, got 'auto'"),
        ({"align": "C"}, "align must be joint, A, B or alternate, got 'C'"),
        ({"nonfinite": "ignore"}, "nonfinite must be raise or drop, got 'ignore'"),
        ({"rounds_done": -1}, "rounds_done must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**option)


@BOTH
def test_replies_before_anything_was_sent(make):
    grid, start = InProcess({1: node(dict), 2: node(dict)}), record({A: EYE, B: EYE})
    replies = grid.send_and_receive(make().configure_train(1, start, ConfigRecord(), grid))
    with pytest.raises(AggregationError, match="configure_train must come before"):
        make().aggregate_train(1, replies)


def test_what_cannot_be_inside():
    with pytest.raises(TypeError, match=r"legacy stack .* fedrot_mod"):
        FedRot(LegacyFedAvg())
    for inner in (FedRot(FedAvg()), FedRotAvg()):
        with pytest.raises(ValueError, match="rotated twice"):
            FedRot(inner)


def test_fedadam_by_hand():
    """FedAdam without momentum: a step of `eta g / (|g| + tau)` with bias correction."""
    grid = InProcess({i: node(turned(3, 2, R)) for i, R in enumerate((QUARTER, EYE), 1)})
    options = {"eta": 0.1, "beta_1": 0.0, "beta_2": 0.0, "tau": 1e-3}
    start = record({A: EYE, B: EYE})
    arrays, _ = one_round(FedRot(FedAdam(**options), lam=1.0), grid, start)
    np.testing.assert_allclose(arrays[A], EYE * (1 + 0.1 * 2 / 2.001), atol=1e-6)
    np.testing.assert_allclose(arrays[B], EYE * (1 + 0.1 * 1 / 1.001), atol=1e-6)
    # By itself FedAdam returns float64, so every download of the next rounds is twice as large.
    assert arrays[A].dtype == np.float32
    plain, _ = one_round(FedAdam(**options), grid, start)
    assert plain[A].dtype == np.float64


@BOTH
def test_global_arrays_in_float64(make):
    """As FedAdam or SecAgg+ leave them; the clients stay in float32."""
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE), 3)})
    start = record({A: EYE.astype(np.float64), B: EYE.astype(np.float64)})
    arrays, _ = one_round(make(lam=1.0), grid, start)
    np.testing.assert_allclose(arrays[A], 3.5 * EYE, atol=1e-6)
    assert arrays[A].dtype == (np.float64 if make is not FedRotAvg else np.float32)


def test_half_precision_is_summed_in_single():
    """FedRotAvg: 2048 + 1 is not a float16, their mean is; FedAvg rounds every term."""
    clients = [np.full((1, 1), v, np.float16) for v in (2048, 1, 2048, 1)]
    apps = {i: node(lambda _, c=c: {A: c, B: c}) for i, c in enumerate(clients, 1)}
    one = record({A: clients[1], B: clients[1]})
    arrays, _ = one_round(FedRotAvg(), InProcess(apps), one)
    assert arrays[A] == np.float16(1024.5) and arrays[A].dtype == np.float16


@BOTH
def test_clients_of_several_types(make):
    """The result has the first one's, as from FedAvg."""
    wide = {key: 4 * EYE.astype(np.float64) for key in (A, B)}
    grid = InProcess({1: node(turned(2, 2, QUARTER)), 2: node(lambda _: wide)})
    messages = list(make().configure_train(1, record({A: EYE, B: EYE}), ConfigRecord(), grid))
    for order in (messages, messages[::-1]):
        strategy = make(lam=1.0)
        strategy.configure_train(1, record({A: EYE, B: EYE}), ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(order))
        np.testing.assert_allclose(values(arrays)[A], 3 * EYE, atol=1e-6)


@BOTH
def test_weights_by_another_key(make):
    keys = {"weighted_by_key": "loss"}  # as large as the number of examples
    strategy = FedRotAvg(lam=1.0, **keys) if make is FedRotAvg else FedRot(FedAvg(**keys), lam=1.0)
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE), 3)})
    arrays, _ = one_round(strategy, grid, record({A: EYE, B: EYE}))
    np.testing.assert_allclose(arrays[A], 3.5 * EYE, atol=1e-6)


def test_no_weight():
    strategy = FedRotAvg(weighted_by_key="seen")
    grid = InProcess({1: node(turned(1, 1, EYE)), 2: node(turned(1, 1, EYE))})
    with pytest.raises(ValueError, match=r"node [12]: the reply's metrics have no number 'seen'"):
        one_round(strategy, grid, record({A: EYE, B: EYE}))


def test_interrupted_and_continued():
    """The strategy inside as pickled after two rounds, and `rounds_done`: the same to the bit."""
    start, clients = draw(1, [4, 4])

    def trained(arrays, client):
        return {key: 0.5 * arrays[key] + 0.5 * client[key] for key in client}

    apps = {i: node(lambda a, c=c: trained(a, c), i) for i, c in enumerate(clients, 1)}

    def build(inner, rounds_done=0):
        return FedRot(inner, lam=0.8, align="alternate", rounds_done=rounds_done)

    def adam():
        return FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99)

    whole = build(adam()).start(InProcess(apps), record(start), num_rounds=5)
    first = build(adam())
    half = first.start(InProcess(apps), record(start), num_rounds=2)
    second = build(pickle.loads(pickle.dumps(first.strategy)), rounds_done=2)
    rest = second.start(InProcess(apps), half.arrays, num_rounds=3)
    for key, array in values(whole.arrays).items():
        np.testing.assert_array_equal(values(rest.arrays)[key], array)
    assert not np.array_equal(values(half.arrays)[A.replace("q", "0")], start[A.replace("q", "0")])


@BOTH
def test_a_run_that_goes_on_counts_rounds_of_evaluation_too(make):
    """What clients are told, and what the strategy inside sees."""
    grid = InProcess({1: node(turned(1, 1, EYE)), 2: node(turned(1, 1, EYE))})
    strategy, start = make(rounds_done=3), record({A: EYE, B: EYE})
    messages = list(strategy.configure_evaluate(2, start, ConfigRecord(), grid))
    assert {m.content["config"]["server-round"] for m in messages} == {5}
    if make is not FedRotAvg:
        seen = []
        strategy.strategy.aggregate_evaluate = lambda round, replies: seen.append(round)
        strategy.aggregate_evaluate(2, [])
        assert seen == [5]


@BOTH
def test_pickled_between_sending_and_receiving(make):
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE))})
    strategy = make(lam=1.0)
    messages = list(strategy.configure_train(1, record({A: EYE, B: EYE}), ConfigRecord(), grid))
    restored = pickle.loads(pickle.dumps(strategy))
    arrays, _ = restored.aggregate_train(1, grid.send_and_receive(messages))
    np.testing.assert_allclose(values(arrays)[A], 3 * EYE, atol=1e-6)


@BOTH
def test_a_whole_run(make, caplog):
    """`start` by Flower itself, with evaluation on the clients; the settings are logged."""
    grid = InProcess({1: node(turned(2, 1, QUARTER)), 2: node(turned(4, 4, EYE))})
    with caplog.at_level(logging.INFO, logger="flwr"):
        result = make(lam=1.0).start(grid, record({A: EYE, B: EYE}), num_rounds=3)
    np.testing.assert_allclose(values(result.arrays)[A], 3 * EYE, atol=1e-5)
    assert [m["accuracy"] for m in result.evaluate_metrics_clientapp.values()] == [0.5] * 3
    assert "lam: 1 | align: joint" in caplog.text
    assert isinstance(result.arrays, ArrayRecord) and isinstance(result.arrays[A], Array)
