"""What `FedRotAggregator` refuses or leaves out, and how it says so."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "nvflare.apis", reason="NVFLARE is not installed: pip install 'fedrot[nvflare]'"
)

from two_clients import (
    EYE,
    FIRST,
    GLOBAL,
    HEAD,
    SECOND,
    A,
    B,
    averaged,
    check,
    client,
    of_two,
    send,
)

from fedrot.nvflare import FedRotAggregator


@pytest.mark.parametrize("steps", [-1, float("nan"), float("inf"), "many", True])
def test_steps_that_are_no_number_are_refused(steps):
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    with pytest.raises(ValueError, match=r"client 'site-1': NUM_STEPS_CURRENT_ROUND must be"):
        aggregator.accept_model(client(FIRST, steps))


def test_whole_parameters_and_differences_do_not_mix():
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    aggregator.accept_model(client(FIRST))
    with pytest.raises(ValueError, match=r"client 'site-2' returns .*DIFF.*all must return"):
        aggregator.accept_model(client(SECOND, 1, "site-2", params_type="DIFF"))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (A, [[1.0, 0.0], [0.0, 1.0]], TypeError, "q.lora_A.weight must be a torch tensor or"),
        (HEAD, torch.ones(2, dtype=torch.bool), TypeError, "torch.bool, which cannot be averaged"),
        (A, torch.ones(1, 2), ValueError, r"lora_A.weight' must be \(2, 2\).*got \(1, 2\)"),
        (HEAD, torch.ones(3), ValueError, r"classifier.weight' must be \(2,\).*got \(3,\)"),
        (B, None, ValueError, "returns no 'base_model.model.q.lora_B.weight' .of 1.*no torch ten"),
        ("else", torch.ones(1), ValueError, "returns 'else'; the global model has no such"),
    ],
)
def test_what_does_not_fit_ends_the_round(key, value, error, message):
    params = {k: v for k, v in {**FIRST, key: value}.items() if v is not None}
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    with pytest.raises(error, match=f"client 'site-1'.*{message}"):
        aggregator.accept_model(client(params))
    # NVFLARE only logs the error; the round must not go on without the client.
    aggregator.accept_model(client(SECOND, 1, "site-2"))
    with pytest.raises(error, match=message):
        aggregator.aggregate_model()
    check(of_two(FedRotAggregator(lam=1.0), round=1), A=2.5 * EYE)


def test_clients_return_the_same_keys():
    few = {A: FIRST[A], B: FIRST[B]}
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    aggregator.accept_model(client(few))
    with pytest.raises(ValueError, match=f"'site-2' returns '{HEAD}', which others do not"):
        aggregator.accept_model(client(SECOND, 1, "site-2"))
    with pytest.raises(ValueError, match=HEAD):
        aggregator.aggregate_model()
    aggregator.accept_model(client(FIRST))
    with pytest.raises(ValueError, match=f"'site-2' returns no '{HEAD}'"):
        aggregator.accept_model(client(few, 1, "site-2"))


def test_not_finite_raises():
    for key in (B, HEAD):
        aggregator = FedRotAggregator()
        send(aggregator, GLOBAL)
        bad = {**SECOND, key: torch.full_like(SECOND[key], float("nan"))}
        with pytest.raises(ValueError, match=r"client 'site-2'.*finite"):
            aggregator.accept_model(client(bad, 1, "site-2"))
        with pytest.raises(ValueError, match=r"client 'site-2'.*finite"):
            averaged(aggregator, client(FIRST))


@pytest.mark.parametrize("key", [B, HEAD])
@pytest.mark.filterwarnings("ignore:client 'site-2':RuntimeWarning")
def test_not_finite_is_dropped(monkeypatch, key):
    warnings: list[str] = []
    aggregator = FedRotAggregator(lam=1.0, nonfinite="drop")
    monkeypatch.setattr(aggregator, "warning", warnings.append)
    send(aggregator, GLOBAL)
    bad = {**SECOND, key: torch.full_like(SECOND[key], float("inf"))}
    metrics = {"accuracy": 0.5}
    result = averaged(
        aggregator,
        client(bad, 9, "site-2", metrics={"accuracy": 1.0}),
        client(FIRST, 1, metrics=metrics),
    )
    check(result.params, A=2 * EYE, B=2 * EYE, head=FIRST[HEAD])
    assert result.metrics == metrics
    assert warnings == ["client 'site-2' has values that are not finite; it is left out"]
    send(aggregator, GLOBAL, 1)
    aggregator.accept_model(client(bad, 9, "site-2"))
    with pytest.raises(ValueError, match="at least one client"):
        aggregator.aggregate_model()


def test_a_late_client_is_left_out(monkeypatch):
    warnings: list[str] = []
    aggregator = FedRotAggregator(lam=1.0)
    monkeypatch.setattr(aggregator, "warning", warnings.append)
    send(aggregator, GLOBAL, 4)
    late = client(SECOND, 9, "site-2", current_round=3)
    result = averaged(aggregator, late, client(FIRST, 1, current_round=4))
    check(result.params, A=2 * EYE, B=2 * EYE)
    assert warnings == ["client 'site-2' is late: round 3; it is left out"]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({HEAD: torch.zeros(2)}, "no LoRA factors"),
        ({A: EYE}, "lora_A.weight' has no factor B"),
        (
            {A: EYE, B: EYE, "base_model.model.q.lora_E": torch.ones(2, 1)},
            r"the global model: .*lora_E' may forbid to rotate",
        ),
    ],
)
def test_a_global_model_that_cannot_be_rotated_is_refused(sent, message):
    aggregator = FedRotAggregator()
    send(aggregator, sent)
    with pytest.raises(ValueError, match=message):
        aggregator.accept_model(client(sent))


def test_nothing_was_sent_and_nobody_answers():
    aggregator = FedRotAggregator()
    with pytest.raises(ValueError, match="no BEFORE_TRAIN_TASK event"):
        aggregator.accept_model(client(FIRST))
    aggregator.reset_stats()
    with pytest.raises(ValueError, match="at least one client"):
        aggregator.aggregate_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        ({"align": "optimal"}, "looks at all clients at once"),
        ({"align": "C"}, "align must be joint, A, B or alternate, got 'C'"),
        ({"nonfinite": "skip"}, "nonfinite must be raise or drop, got 'skip'"),
    ],
)
def test_options_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        FedRotAggregator(**options)
