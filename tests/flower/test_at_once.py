"""FedLoRA: methods that look at all clients at once, through Flower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from in_process import InProcess, node, one_round, record, values

from fedrot import methods
from fedrot.factors import Factors
from fedrot.flower import FedLoRA, FedRot, FedRotAvg
from fedrot.methods import FlexLoRA, Robust

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.head.weight"
EYE = np.eye(2, dtype=np.float32)


def sends(a, b, head=0.0):
    arrays = {A: np.array(a, np.float32), B: np.array(b, np.float32)}
    return lambda _: {**arrays, HEAD: np.full(3, head, np.float32)}


# Products diag(8, 0) and diag(0, 3), the second of rank 1 and counting thrice: the mean is
# diag(2, 2.25), of whose squares 4 / 9.0625 = .441 are in the first direction, .559 in the second.
CLIENTS = {1: node(sends(2 * EYE, [[4, 0], [0, 0]], 4), 1), 2: node(sends([[0, 3]], [[0], [1]]), 3)}
START = record({A: np.ones((2, 2)), B: np.zeros((2, 2)), HEAD: np.zeros(3, np.float32)})


@pytest.mark.parametrize(("energy", "rank"), [(0.55, 1), (0.56, 2), (1.0, 2), (None, 2)])
def test_flexlora_by_hand(energy, rank):
    strategy = FedLoRA(FlexLoRA(energy=energy))
    arrays, metrics = one_round(strategy, InProcess(CLIENTS), START)
    mean = np.diag([2.0 if rank == 2 else 0.0, 2.25])
    np.testing.assert_allclose(arrays[B] @ arrays[A], mean, atol=1e-6)
    assert arrays[A].shape == arrays[B].shape == (2, 2)  # the global ones, whatever the rank
    np.testing.assert_allclose(arrays[A][0], [0, 1], atol=1e-6)  # singular values are sorted
    assert np.count_nonzero(arrays[A][rank:]) == np.count_nonzero(arrays[B][:, rank:]) == 0
    np.testing.assert_allclose(arrays[HEAD], [1, 1, 1])
    assert list(arrays) == list(START) and arrays[A].dtype == np.float32
    expected = {"loss": 2.5}
    if energy:
        expected.update(ranks=[rank], rank=float(rank))
    assert dict(metrics) == expected


def test_a_rank_that_was_cut_rises_again():
    """The bound is the shape of the global arrays, whose last direction is zero by now."""
    strategy = FedLoRA(FlexLoRA(energy=0.55))
    first, _ = one_round(strategy, InProcess(CLIENTS), START)
    assert np.count_nonzero(first[A][1]) == 0
    # Clients of rank 1: diag(8, 0) / 4 and diag(0, 4) 3 / 4; 9 / 13 = .69 in one direction.
    apps = {1: node(sends([[2, 0]], [[4], [0]]), 1), 2: node(sends([[0, 2]], [[0], [2]]), 3)}
    strategy = FedLoRA(FlexLoRA(energy=0.95))
    second, metrics = one_round(strategy, InProcess(apps), record(first), 2)
    np.testing.assert_allclose(second[B] @ second[A], np.diag([2, 3]), atol=1e-6)
    assert metrics["ranks"] == [2]


def draw(seed, ranks, r=4):
    """Global arrays of rank `r`, and clients' of some ranks."""
    rng = np.random.default_rng(seed)

    def one(rank):
        arrays = {}
        for i in range(3):
            arrays[f"base_model.model.{i}.lora_A.weight"] = rng.normal(size=(rank, 6 + i))
            arrays[f"base_model.model.{i}.lora_B.weight"] = rng.normal(size=(5, rank))
        return {key: value.astype(np.float32) for key, value in arrays.items()}

    return one(r), [one(rank) for rank in ranks]


def factors(arrays):
    sides = {"A": {}, "B": {}}
    for key, value in arrays.items():
        layer, _, rest = key.partition(".lora_")
        sides[rest[0]][layer] = torch.from_numpy(value)
    return Factors(**sides)


TAKEN = {
    "flexlora": FlexLoRA("reference"),
    "energy": FlexLoRA(energy=0.8),
    "gpa": methods.FedRot(1.0, "gpa"),
    "optimal": methods.FedRot(1.0, "optimal"),
    "auto": methods.FedRot("auto"),
    "alternate": methods.FedRot(0.6, "alternate"),
    "median": Robust("median"),
    "krum": Robust("krum"),
    "clip": Robust("clip", bound=1.0),
    "hetlora": methods.HetLoRA(),
    "fair": methods.LoRAFAIR(),
    "fedit": methods.FedIT(),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("round", [1, 2])
def test_same_as_the_method(name, round):
    method, weights = TAKEN[name], [5, 1, 3, 2, 4]
    start, clients = draw(0, [4, 2, 4, 1, 3])
    apps = {
        i: node(lambda _, c=c: c, w)
        for i, (c, w) in enumerate(zip(clients, weights, strict=True), 1)
    }
    arrays, _ = one_round(FedLoRA(method), InProcess(apps), record(start), round)
    wanted = method.aggregate(
        [factors(c) for c in clients], factors(start), torch.tensor(weights), round=round - 1
    )
    for layer, new in wanted.A.items():
        r = len(new)
        np.testing.assert_array_equal(arrays[f"{layer}.lora_A.weight"][:r], new)
        np.testing.assert_array_equal(arrays[f"{layer}.lora_B.weight"][:, :r], wanted.B[layer])
    later = FedLoRA(method, rounds_done=round - 1)
    again, _ = one_round(later, InProcess(apps), record(start), 1)
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize("name", ["fedit", "optimal", "median"])
def test_the_order_of_arrival_changes_no_bit(name):
    start, clients = draw(3, [4] * 7)
    grid = InProcess({i: node(lambda _, c=c: c, i) for i, c in enumerate(clients, 1)})
    found = []
    for order in (1, -1):
        strategy = FedLoRA(TAKEN[name], rounds_done=2)
        messages = list(strategy.configure_train(1, record(start), ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))[::order]
        found.append(values(strategy.aggregate_train(1, replies)[0]))
    assert all(np.array_equal(found[0][key], found[1][key]) for key in start)
    evaluated = list(strategy.configure_evaluate(1, record(start), ConfigRecord(), grid))
    assert {m.content["config"]["server-round"] for m in evaluated} == {3}


def test_errors_and_nans_are_left_out():
    def fails(_):
        raise RuntimeError

    grid = InProcess({**CLIENTS, 3: node(sends([[np.nan, 0]], [[0], [0]])), 4: node(fails)})
    arrays, _ = one_round(FedLoRA(FlexLoRA(), nonfinite="drop"), grid, START)
    np.testing.assert_allclose(arrays[B] @ arrays[A], np.diag([2, 2.25]), atol=1e-6)
    with pytest.raises(ValueError, match=f"node 3: '{A}' holds a NaN or infinity"):
        one_round(FedLoRA(FlexLoRA()), grid, START)
    assert one_round(FedLoRA(FlexLoRA()), InProcess({1: node(fails), 2: node(fails)}), START) == (
        None,
        None,
    )


REFUSED = [
    (methods.FedExLoRA(), "method: FedEx-LoRA folds into the frozen weights"),
    (methods.FLoRA(), "method: FLoRA folds into the frozen weights"),
    (methods.FedSALoRA(), "method: FedSA-LoRA leaves B with the clients"),
    (methods.FFALoRA(), "method: FFA-LoRA trains one factor at a time"),
    (methods.RoLoRA(), "method: RoLoRA trains one factor at a time"),
    (methods.FedRot(lag=2), "FedRot-LoRA with lag=2 needs the global factors of an earlier round"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED)
def test_methods_that_need_more(method, message):
    with pytest.raises(ValueError, match=message):
        FedLoRA(method)


def test_every_method_is_taken_or_refused():
    seen = {type(m) for m in (*TAKEN.values(), *(m for m, _ in REFUSED))}
    assert seen == set(methods.METHODS.values())


def test_refused():
    with pytest.raises(TypeError, match=r"method must be one of fedrot.methods, got 'flexlora'"):
        FedLoRA("flexlora")
    with pytest.raises(ValueError, match="nonfinite must be raise or drop, got 'ignore'"):
        FedLoRA(FlexLoRA(), nonfinite="ignore")
    with pytest.raises(ValueError, match="FedRot around FedLoRA: its method takes the replies"):
        FedRot(FedLoRA(FlexLoRA()))
    grid = InProcess(CLIENTS)
    around = DifferentialPrivacyServerSideFixedClipping(FedLoRA(FlexLoRA()), 0.1, 1.0, 2)
    with pytest.raises(ValueError, match="around FedLoRA: it calibrates its noise to a mean"):
        around.configure_train(1, START, ConfigRecord(), grid)
    larger = InProcess({**CLIENTS, 1: node(sends(np.ones((3, 2)), np.ones((2, 3))))})
    with pytest.raises(ValueError, match="rank must not exceed the global one"):
        one_round(FedLoRA(FlexLoRA()), larger, START)
    with pytest.raises(
        ValueError, match="rule=krum with attackers=1 needs at least 5 clients, got 2"
    ):
        one_round(FedLoRA(Robust("krum")), grid, START)


def test_the_fused_average_is_this_with_the_paper_s_method():
    start, clients = draw(1, [4, 4])
    grid = InProcess({i: node(lambda _, c=c: c) for i, c in enumerate(clients, 1)})
    fused, _ = one_round(FedRotAvg(lam=0.7), grid, record(start))
    at_once, _ = one_round(FedLoRA(methods.FedRot(0.7)), grid, record(start))
    for key, value in at_once.items():
        np.testing.assert_allclose(fused[key], value, atol=2e-6)


@pytest.mark.parametrize("rule", ["median", "clip"])
def test_a_robust_rule_is_for_what_is_beside_the_factors_too(rule):
    """Heads of 1, 2 and -900, each with one vote: their middle, or by the changes from [1, 1, 1],
    of lengths 0, 3^.5 and much, the last cut to 3^.5. A counter is averaged as FedAvg does, and so
    is what the global arrays have not."""
    counter, other = "base_model.model.norm.num_batches_tracked", "base_model.model.extra.weight"
    start = record({A: EYE, B: EYE, HEAD: np.ones(3, np.float16), counter: np.array([5], np.int64)})
    apps = {}
    for i, head in enumerate((1.0, 2.0, -900.0), 1):
        more = {
            HEAD: np.full(3, head, np.float16),
            counter: np.array([6], np.int64),
            other: np.full(2, 3.0 * i, np.float32),
        }
        apps[i] = node(lambda _, more=more: {A: EYE, B: EYE, **more}, 1)
    arrays, _ = one_round(FedLoRA(Robust(rule)), InProcess(apps), start)
    wanted = {"median": 1.0, "clip": 1 + (0 + 1 - 1) / 3}[rule]
    np.testing.assert_allclose(arrays[HEAD], np.full(3, wanted), atol=1e-3)
    assert arrays[HEAD].dtype == np.float16
    np.testing.assert_allclose(arrays[counter], [6])
    np.testing.assert_allclose(arrays[other], [6, 6])
    np.testing.assert_allclose(arrays[A], EYE, atol=1e-6)


def test_what_is_beside_the_factors_may_be_any_float_of_the_global_shape():
    """NumPy's floats that PyTorch has not; another shape names its node: it would be broadcast."""
    for dtype in (">f4", np.longdouble, np.float16):
        start = record({A: EYE, B: EYE, HEAD: np.zeros(3, dtype)})
        heads = [np.full(3, h, dtype) for h in (1.0, 2.0, 9.0)]
        apps = {
            i: node(lambda _, h=h: {A: EYE, B: EYE, HEAD: h}, 1) for i, h in enumerate(heads, 1)
        }
        arrays, _ = one_round(FedLoRA(Robust("median")), InProcess(apps), start)
        np.testing.assert_array_equal(arrays[HEAD], np.full(3, 2.0))
    apps[2] = node(lambda _: {A: EYE, B: EYE, HEAD: np.ones(1, np.float16)}, 1)
    message = rf"node 2: '{HEAD}' has shape \(1,\), the global one \(3,\)"
    with pytest.raises(ValueError, match=message):
        one_round(FedLoRA(methods.FedIT()), InProcess(apps), start)
    large = {i: node(lambda _: {A: EYE, B: EYE, HEAD: np.full(3, 1e6)}, 1) for i in (1, 2)}
    with pytest.raises(ValueError, match=rf"the new '{HEAD}' does not fit into float16"):
        one_round(FedLoRA(methods.FedIT()), InProcess(large), start)
