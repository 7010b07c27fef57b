"""fedrot_mod: rotates on the client; in the current stack and, under SecAgg+, in the legacy one."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import fixedclipping_mod, secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp.strategy import FedAdam, FedAvg
from in_process import InProcess, node, one_round, record, values

from fedrot.flower import FedRot, FedRotMod, fedrot_mod

A, B = "q.lora_A.weight", "q.lora_B.weight"
EYE = np.eye(2, dtype=np.float32)
QUARTER = np.array([[0, -1], [1, 0]], dtype=np.float32)  # a turn by 90 degrees


def turned(a, b, R, **more):
    return lambda arrays: {**more, A: a * R, B: b * R.T}


def test_two_clients_by_hand():
    """As `FedRot(FedAvg())`, with a server that knows nothing of it."""
    mods = [FedRotMod(lam=1.0)]
    grid = InProcess(
        {1: node(turned(2, 1, QUARTER), mods=mods), 2: node(turned(4, 4, EYE), 3, mods=mods)}
    )
    arrays, metrics = one_round(FedAvg(), grid, record({A: EYE, B: EYE}))
    np.testing.assert_allclose(arrays[A], 3.5 * EYE, atol=1e-6)
    np.testing.assert_allclose(arrays[B], 3.25 * EYE, atol=1e-6)
    assert dict(metrics) == {"loss": 2.5}


def test_default_is_a_soft_rotation_like_the_strategys():
    start = record({A: EYE, B: EYE})
    clients = {1: turned(2, 1, QUARTER), 2: turned(4, 4, EYE)}
    by_mod = {i: node(train, mods=[fedrot_mod]) for i, train in clients.items()}
    plain = {i: node(train) for i, train in clients.items()}
    ours, _ = one_round(FedAvg(), InProcess(by_mod), start)
    theirs, _ = one_round(FedRot(FedAvg()), InProcess(plain), start)
    np.testing.assert_allclose(ours[A], theirs[A], atol=1e-6)
    # The rotation by 90 degrees turns by atan2(0.4, 0.6).
    angle = np.arctan2(0.4, 0.6)
    left = np.pi / 2 - angle
    expected = 2 * np.array([[np.cos(left), -np.sin(left)], [np.sin(left), np.cos(left)]])
    np.testing.assert_allclose(2 * ours[A] - 4 * EYE, expected, atol=1e-6)


def test_smaller_rank_is_padded_and_other_arrays_pass():
    row, head = np.array([[0, 2]], np.float32), np.arange(3, dtype=np.float32)
    upload = {"head": head, A: row, B: row.T / 2}
    app = node(lambda _: upload, mods=[FedRotMod(lam=1.0)])
    arrays, _ = one_round(FedAvg(), InProcess({1: app, 2: app}), record({A: EYE, B: EYE}))
    # The one row of A lies along the second row of the global A already.
    np.testing.assert_allclose(arrays[A], [[0, 0], [0, 2]], atol=1e-6)
    np.testing.assert_allclose(arrays[B], [[0, 0], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(arrays["head"], head)
    assert list(arrays) == ["head", A, B]


def test_alternate_follows_the_servers_round():
    app = node(lambda _: {A: QUARTER, B: EYE}, mods=[FedRotMod(lam=1.0, align="alternate")])
    grid, start = InProcess({1: app, 2: app}), record({A: EYE, B: EYE})
    plain, fitted_to_A = (QUARTER, EYE), (EYE, QUARTER)
    for round, expected in ((1, plain), (2, fitted_to_A), (3, plain), (4, fitted_to_A)):
        arrays, _ = one_round(FedAvg(), grid, start, round)
        np.testing.assert_allclose((arrays[A], arrays[B]), expected, atol=1e-6)


def test_alternate_needs_a_round():
    app = node(dict, mods=[FedRotMod(align="alternate")])
    message = Message(RecordDict({"arrays": record({A: EYE, B: EYE})}), 1, "train")
    (reply,) = InProcess({1: app}).send_and_receive([message])
    assert "config['server-round'] is missing" in reply.error.reason


def test_global_arrays_in_float64_from_fedadam():
    """Two rounds: FedAdam sends float64 in the second, the client goes on in float32."""
    seen = []

    def train(arrays):
        seen.append(arrays[A].dtype)
        return {key: (2 * array).astype(np.float32) for key, array in arrays.items()}

    app = node(train, mods=[FedRotMod(lam=1.0)])
    strategy = FedAdam(eta=0.1, beta_1=0.0, beta_2=0.0, tau=1e-3)
    result = strategy.start(InProcess({1: app, 2: app}), record({A: EYE, B: EYE}), num_rounds=2)
    assert seen == [np.float32] * 2 + [np.float64] * 2
    once = 1 + 0.1 * 1 / 1.001
    twice = once + 0.1 * once / (once + 1e-3)
    np.testing.assert_allclose(values(result.arrays)[A], twice * EYE, atol=1e-6)


def test_messages_other_than_train_pass():
    app = ClientApp(mods=[fedrot_mod])

    @app.query()
    def _(message, context):
        return Message(RecordDict({"arrays": record({"w": EYE})}), reply_to=message)

    @app.train("warm_up")
    def _(message, context):
        return Message(RecordDict(), reply_to=message)

    messages = [Message(RecordDict(), 1, kind) for kind in ("query", "train.warm_up")]
    answered, empty = InProcess({1: app}).send_and_receive(messages)
    np.testing.assert_array_equal(values(answered.content["arrays"])["w"], EYE)
    assert not empty.has_error()


def test_a_named_train_function_is_rotated_and_may_take_the_arrays_out():
    app = ClientApp(mods=[FedRotMod(lam=1.0)])

    @app.train("mine")
    def _(message, context):
        message.content["arrays"].clear()
        content = RecordDict({"arrays": record({A: QUARTER, B: QUARTER.T})})
        return Message(content, reply_to=message)

    content = RecordDict({"arrays": record({A: EYE, B: EYE})})
    (reply,) = InProcess({1: app}).send_and_receive([Message(content, 1, "train.mine")])
    np.testing.assert_allclose(values(reply.content["arrays"])[A], EYE, atol=1e-6)


@pytest.mark.parametrize(
    "start, upload, message",
    [
        ({"w": EYE}, {"w": EYE}, "no LoRA factors"),
        ({A: EYE, B: EYE}, {A: EYE}, f"the reply: '{B}' is missing"),
        ({A: EYE, B: EYE}, {A: EYE * np.nan, B: EYE}, "non-finite value"),
    ],
    ids=["no factors", "half a pair", "not a number"],
)
def test_what_does_not_fit_is_the_clients_failure(start, upload, message):
    grid = InProcess({1: node(lambda _: upload, mods=[fedrot_mod])})
    content = RecordDict({"arrays": record(start)})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert message in reply.error.reason


def test_several_records_are_refused():
    grid = InProcess({1: node(turned(1, 1, EYE), mods=[fedrot_mod])})
    content = RecordDict({"arrays": record({A: EYE, B: EYE}), "more": record({"w": EYE})})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert "one ArrayRecord in the message and one in the reply, got 2 and 1" in reply.error.reason


class Legacy(NumPyClient):
    """A client of the legacy stack: lists of arrays without names."""

    def __init__(self, train):
        self.train = train

    def fit(self, parameters, config):
        return self.train(*parameters), 10, {}


def legacy_app(train, mods):
    def client_fn(context: Context):
        return Legacy(train).to_client()

    return ClientApp(client_fn, mods=mods)


def legacy_run(clients, mods, strategy, fit=None, rounds=1):
    """The global arrays after a run of Flower's legacy workflow."""
    apps = {i: legacy_app(train, mods) for i, train in enumerate(clients, 1)}
    context = LegacyContext(
        Context(1, 0, {}, RecordDict(), {}), ServerConfig(num_rounds=rounds), strategy
    )
    DefaultWorkflow(fit_workflow=fit, evaluate_workflow=lambda grid, context: None)(
        InProcess(apps), context
    )
    return list(values(context.state.array_records["parameters"]).values())


def legacy_strategy():
    start = ndarrays_to_parameters([EYE, EYE])
    return LegacyFedAvg(initial_parameters=start, min_fit_clients=3, min_available_clients=3)


@pytest.mark.parametrize("clip", [False, True], ids=["masks", "clipping and masks"])
def test_secure_aggregation(clip):
    """Three clients in three bases; `[secaggplus_mod, clip, fedrot_mod]` gives their mean, up to
    the quantisation to 16 / 2^22, in two rounds (the second starts from float64)."""
    clients = [lambda A, B, R=R: [2 * R, R.T] for R in (QUARTER, EYE, -EYE)]
    turn = FedRotMod(lam=1.0, names=[A, B])
    masked = SecAggPlusWorkflow(3, 2, max_weight=10.0)
    strategy = legacy_strategy()
    if clip:  # the largest update, A from I to 2 I, is of norm sqrt(2)
        strategy = DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, 1.5, 3)
    mods = [secaggplus_mod, *([fixedclipping_mod] if clip else []), turn]
    arrays = legacy_run(clients, mods, strategy, masked, rounds=2)
    np.testing.assert_allclose(arrays[0], 2 * EYE, atol=1e-5)
    np.testing.assert_allclose(arrays[1], EYE, atol=1e-5)
    assert arrays[0].dtype == np.float64
    plain = legacy_run(clients, [secaggplus_mod], legacy_strategy(), masked)
    assert np.abs(plain[1] @ plain[0] - 2 * EYE).max() > 1


def test_legacy_rounds_are_counted():
    """Clients turn `A` once more every round: the first round keeps that, the second hands the
    turn on to `B`."""
    clients = [lambda A, B: [QUARTER @ A, B]] * 3
    turn = FedRotMod(lam=1.0, align="alternate", names=[A, B])
    arrays = legacy_run(clients, [turn], legacy_strategy())
    np.testing.assert_allclose(arrays, (QUARTER, EYE), atol=1e-6)
    arrays = legacy_run(clients, [turn], legacy_strategy(), rounds=2)
    np.testing.assert_allclose(arrays, (QUARTER, QUARTER), atol=1e-6)


@pytest.mark.parametrize(
    "names, message",
    [(None, "need the option names"), ([A], "names must name all 2 arrays, got 1")],
)
def test_legacy_arrays_need_names(names, message):
    app = legacy_app(lambda A, B: [A, B], [FedRotMod(names=names)])
    content = RecordDict({"fitins.parameters": record({"0": EYE, "1": EYE})})
    content["fitins.config"] = ConfigRecord()
    (reply,) = InProcess({1: app}).send_and_receive([Message(content, 1, "train")])
    assert message in reply.error.reason
