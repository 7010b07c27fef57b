"""Rotate first, clip and mask after: what the order is worth, and that a wrong one is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.client.mod import fixedclipping_mod as legacy_clipping
from flwr.client.mod import secagg_mod, secaggplus_mod
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from in_process import InProcess, node, one_round, record

from fedrot.factors import Factors
from fedrot.flower import FedRot, FedRotAvg, FedRotMod, fedrot_mod
from fedrot.gauge import regauge

A, B = "q.lora_A.weight", "q.lora_B.weight"
CLIENTS, NORM = 4, 2.0


@pytest.fixture(scope="module")
def clients():
    """A small update of the global factors each, handed in in a basis of the client's own."""
    draw = torch.Generator().manual_seed(0)
    r, d, k = 4, 16, 24
    start = Factors(
        {"": torch.randn(r, k, generator=draw)}, {"": torch.randn(d, r, generator=draw)}
    )
    found = []
    for _ in range(CLIENTS):
        step_A, step_B = (
            0.05 * torch.randn(t.shape, generator=draw) for t in (start.A[""], start.B[""])
        )
        trained = Factors({"": start.A[""] + step_A}, {"": start.B[""] + step_B})
        found.append(regauge(trained, draw, proper=True))
    return start, found


def arrays_of(factors):
    return {A: factors.A[""].numpy(), B: factors.B[""].numpy()}


def error(arrays, clients):
    """Of the product, relative to the mean of the clients'."""
    exact = np.mean([(c.B[""] @ c.A[""]).numpy() for c in clients], axis=0)
    return np.linalg.norm(arrays[B] @ arrays[A] - exact) / np.linalg.norm(exact)


def nodes(clients, mods=()):
    return InProcess(
        {i: node(lambda _, c=c: arrays_of(c), mods=mods) for i, c in enumerate(clients, 1)}
    )


def server_clipping(strategy):
    return DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, NORM, CLIENTS)


def client_clipping(strategy):
    return DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, NORM, CLIENTS)


def test_clipping_on_the_server(clients):
    start, uploads = clients
    grid, begin = nodes(uploads), record(arrays_of(start))
    right, _ = one_round(FedRot(server_clipping(FedAvg()), lam=1.0), grid, begin)

    # The wrong order, past the check: what clips is told of the round by hand.
    inside = FedRot(FedAvg(), lam=1.0)
    outside = server_clipping(inside)
    messages = inside.configure_train(1, begin, ConfigRecord(), grid)
    outside.current_arrays = begin
    new, _ = outside.aggregate_train(1, grid.send_and_receive(messages))
    wrong = {key: array.numpy() for key, array in new.items()}
    _compare(error(right, uploads), error(wrong, uploads))


def test_clipping_on_the_clients(clients):
    start, uploads = clients
    begin, turn = record(arrays_of(start)), FedRotMod(lam=1.0)
    grid = nodes(uploads, [fixedclipping_mod, turn])
    right, _ = one_round(client_clipping(FedAvg()), grid, begin)

    def clip_and_turn(message, context, call_next):  # hidden in a mod of one's own
        def clipped(message, context):
            return fixedclipping_mod(message, context, call_next)

        return turn(message, context, clipped)

    wrong, _ = one_round(client_clipping(FedAvg()), nodes(uploads, [clip_and_turn]), begin)
    _compare(error(right, uploads), error(wrong, uploads))


def _compare(right, wrong):
    assert right < 0.005
    assert wrong > 0.1


def test_adaptive_clipping_goes_around_too(clients):
    start, uploads = clients
    begin = record(arrays_of(start))
    around = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, CLIENTS, NORM)
    arrays, _ = one_round(FedRot(around, lam=1.0), nodes(uploads), begin)
    assert error(arrays, uploads) < 0.005
    inside = DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.0, CLIENTS, NORM)
    mods = [adaptiveclipping_mod, FedRotMod(lam=1.0)]
    arrays, _ = one_round(inside, nodes(uploads, mods), begin)
    assert error(arrays, uploads) < 0.005


def test_noise_is_added_after_the_rotation(clients):
    """The mean of many rounds of noise around the aligned average, of the deviation promised."""
    start, uploads = clients
    grid, begin = nodes(uploads), record(arrays_of(start))
    exact, _ = one_round(FedRot(server_clipping(FedAvg()), lam=1.0), grid, begin)
    np.random.seed(0)
    noisy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.3, NORM, CLIENTS)
    arrays, _ = one_round(FedRot(noisy, lam=1.0), grid, begin)
    noise = np.concatenate([(arrays[key] - exact[key]).ravel() for key in (A, B)])
    assert abs(noise.std() / (0.3 * NORM / CLIENTS) - 1) < 0.2


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda s: server_clipping(s),
        lambda s: client_clipping(s),
        lambda s: DifferentialPrivacyServerSideAdaptiveClipping(s, 0.0, CLIENTS),
        lambda s: DifferentialPrivacyClientSideAdaptiveClipping(s, 0.0, CLIENTS),
    ],
    ids=["server", "client", "server adaptive", "client adaptive"],
)
@pytest.mark.parametrize("make", [lambda: FedRot(FedAvg()), FedRotAvg], ids=["around", "fused"])
def test_wrappers_that_clip_are_refused_outside(wrapper, make, clients):
    """Nothing has been sent yet when the first round says so."""
    start, uploads = clients
    grid = nodes(uploads)
    with pytest.raises(ValueError, match="clips before FedRot rotates"):
        wrapper(make()).configure_train(1, record(arrays_of(start)), ConfigRecord(), grid)
    assert grid.sent == []


def test_wrappers_that_clip_on_the_client_are_refused_inside():
    adaptive = DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.0, CLIENTS)
    for inner in (client_clipping(FedAvg()), adaptive, server_clipping(adaptive)):
        with pytest.raises(ValueError, match="clients have clipped before FedRot rotates"):
            FedRot(inner)
    with pytest.raises(ValueError, match="rotated twice"):
        FedRot(server_clipping(FedRotAvg()))


@pytest.mark.parametrize(
    "mod",
    [
        fixedclipping_mod,
        adaptiveclipping_mod,
        LocalDpMod(1.0, 0.1, 1.0, 0.1),
        legacy_clipping,
        secagg_mod,
        secaggplus_mod,
    ],
    ids=lambda mod: getattr(mod, "__name__", "LocalDpMod"),
)
def test_mods_behind_fedrot_mod_are_refused(mod, clients):
    """On the first message, before the client trains."""
    start, _ = clients
    trained = []
    app = node(lambda arrays: trained.append(1), mods=[fedrot_mod, message_size_mod, mod])
    grid = InProcess({1: app, 2: app})
    messages = list(FedAvg().configure_train(1, record(arrays_of(start)), ConfigRecord(), grid))
    for reply in grid.send_and_receive(messages):
        assert "comes after fedrot_mod in the list of mods" in reply.error.reason
    assert not trained


def test_mods_that_only_look_may_be_anywhere(clients):
    start, uploads = clients
    mods = [arrays_size_mod, FedRotMod(lam=1.0), message_size_mod]
    arrays, _ = one_round(FedAvg(), nodes(uploads, mods), record(arrays_of(start)))
    assert error(arrays, uploads) < 0.005


def test_local_dp_after_the_rotation(clients):
    """Almost no noise: what is left is the clipping of small, aligned updates."""
    start, uploads = clients
    mods = [LocalDpMod(NORM, 1e-6, 1.0, 0.1), FedRotMod(lam=1.0)]
    arrays, _ = one_round(FedAvg(), nodes(uploads, mods), record(arrays_of(start)))
    assert error(arrays, uploads) < 0.005
