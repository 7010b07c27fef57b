"""What the aggregator that sees one client at a time refuses or leaves out, and what then stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clients import check, filled, problem, spoiled

from fedrot.factors import Factors
from fedrot.streaming import StreamingAggregator

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bad_states():
    ref, uploads, _ = problem()
    aggregator = filled(ref, uploads)
    expected, state = aggregator.state_dict(), aggregator.state_dict()
    key = "mean/A/encoder.q"
    bad = {
        "missing .'weight'., unknown .'x'.": {**state, "x": state["weight"]},
        f"{key} must be .4, 14., got .1,": {**state, key: torch.ones(1)},
        f"{key} holds a value that is not finite": {**state, key: state[key] * torch.nan},
        "weight must be non-negative and finite, got -1": {**state, "weight": torch.tensor(-1.0)},
        "same reference and options": filled(ref, uploads, lam=0.5).state_dict(),
    }
    bad |= {
        f"{name} must be .., got .3,": {**state, name: torch.ones(3)}
        for name in ("weight", "clients", "dropped")
    }
    del bad["missing .'weight'., unknown .'x'."]["weight"]
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            aggregator.load_state_dict(wrong)
        with pytest.raises(ValueError, match=message):
            aggregator.merge(wrong)
    assert all(torch.equal(t, expected[k]) for k, t in aggregator.state_dict().items())


def without(client, layer):
    return Factors(*({n: t for n, t in f.items() if n != layer} for f in (client.A, client.B)))


BAD_CLIENTS = {
    "client 5: lora_B holds a non-finite value for layer encoder.v": lambda c: spoiled(
        c, "encoder.v", torch.nan
    ),
    "client 5: lora_A holds a non-finite value for layer head": lambda c: spoiled(
        c, "head", -torch.inf, "A"
    ),
    "client 5: the cross-covariance or the result overflows": lambda c: Factors(
        {n: A / A.abs().max() * 3e38 for n, A in c.A.items()}, c.B
    ),
    "client 5: there is no layer encoder.v": lambda c: without(c, "encoder.v"),
    "client 5: the reference has no layer extra": lambda c: Factors(
        {**c.A, "extra": c.A["head"]}, {**c.B, "extra": c.B["head"]}
    ),
    "client 5: lora_A has rank 6 for layer head, more than the reference's 5": lambda c: Factors(
        {**c.A, "head": torch.ones(6, 5)}, {**c.B, "head": torch.ones(5, 6)}
    ),
    r"client 5: lora_B must be \(31, 2\) for layer encoder.v, got \(30, 2\)": lambda c: Factors(
        c.A, {**c.B, "encoder.v": torch.ones(30, 2)}
    ),
    "client 5: lora_A must be torch.float32 throughout, got torch.float64 for layer encoder.v": (
        lambda c: Factors({**c.A, "encoder.v": c.A["encoder.v"].double()}, c.B)
    ),
    "client 5: lora_A must be on cpu throughout, got meta for layer head": lambda c: Factors(
        {**c.A, "head": c.A["head"].to("meta")}, c.B
    ),
}


@pytest.mark.parametrize("message", BAD_CLIENTS)
def test_a_bad_client_changes_nothing(message):
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads)
    bad = BAD_CLIENTS[message](uploads[0])
    with pytest.raises((ValueError, TypeError), match=message):
        aggregator.accept(bad)
    with pytest.raises((ValueError, TypeError), match="client site-7"):
        aggregator.accept(bad, name="site-7")
    assert (aggregator.clients, aggregator.weight, aggregator.dropped) == (5, 5.0, 0)
    check(aggregator.finish(), inputs)


@pytest.mark.parametrize("message", BAD_CLIENTS)
def test_dropping_is_for_values_alone(message):
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads, nonfinite="drop")
    bad = BAD_CLIENTS[message](uploads[0])
    if "finite" in message or "overflow" in message:
        with pytest.warns(RuntimeWarning, match=f"{message}.*; it is left out") as caught:
            assert not aggregator.accept(bad, 9.0)
        assert caught[0].filename == __file__
        assert aggregator.dropped == 1
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            aggregator.accept(bad, 9.0)
        assert aggregator.dropped == 0
    assert (aggregator.clients, aggregator.weight) == (5, 5.0)
    check(aggregator.finish(), inputs)


def test_a_warning_that_raises_leaves_all_as_it_was():
    """Warnings are errors in these tests unless they are caught."""
    ref, uploads, _ = problem()
    aggregator = filled(ref, uploads, nonfinite="drop")
    with pytest.raises(RuntimeWarning, match="non-finite"):
        aggregator.accept(spoiled(uploads[0], "head", torch.nan))
    assert (aggregator.clients, aggregator.dropped) == (5, 0)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_bad_weights(weight):
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads)
    with pytest.raises(ValueError, match=f"client 5: weight must be .*, got {weight}"):
        aggregator.accept(uploads[0], weight)
    check(aggregator.finish(), inputs)


def test_the_sum_of_weights_is_finite():
    ref, uploads, _ = problem()
    aggregator = filled(ref, uploads[:1], [1.5e308])
    with pytest.raises(ValueError, match="weights must have a finite sum"):
        aggregator.merge(aggregator)
    with pytest.raises(ValueError, match="weight must be non-negative with a finite sum"):
        aggregator.accept(uploads[0], 1.5e308)
    assert aggregator.weight == 1.5e308


def test_nothing_to_average():
    ref, uploads, _ = problem()
    aggregator = StreamingAggregator(ref)
    with pytest.raises(ValueError, match="at least one client"):
        aggregator.finish()
    aggregator.accept(uploads[0], 0.0)
    aggregator.accept(uploads[1], 0)
    with pytest.raises(ValueError, match="positive sum, all 2 are zero"):
        aggregator.finish()
    with pytest.raises(ValueError, match="client 2: lora_B holds a non-finite value"):
        aggregator.accept(spoiled(uploads[0], "head", torch.nan), 0.0)


def test_bad_references_and_options():
    ref, uploads, _ = problem()
    other = problem(seed=1)[0]
    for message, make in {
        "nonfinite must be raise or drop, got 'skip'": lambda: StreamingAggregator(
            ref, nonfinite="skip"
        ),
        "lam must lie in": lambda: StreamingAggregator(ref, lam=1.1),
        "align must be one of": lambda: StreamingAggregator(ref, align="alternate"),
        "reference: there must be at least one layer": lambda: StreamingAggregator(Factors({}, {})),
        "reference: ref_B holds a non-finite value for layer head": lambda: StreamingAggregator(
            spoiled(ref, "head", torch.nan)
        ),
        "reference: .*ref_A.*layer encoder.v": lambda: StreamingAggregator(
            Factors({**ref.A, "encoder.v": torch.ones(3)}, ref.B)
        ),
        "same options": lambda: filled(ref, uploads).merge(filled(ref, uploads, align="A")),
        "same reference": lambda: filled(ref, uploads).merge(filled(other, uploads)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"reference: ref_A must be float64, .*int64"):
        StreamingAggregator(Factors({"m": torch.ones(2, 2).long()}, {"m": torch.ones(2, 2).long()}))


def test_a_state_dict_is_no_adapter():
    ref, uploads, _ = problem()
    aggregator = filled(ref, uploads)
    state = {f"{name}.lora_A.weight": A for name, A in ref.A.items()}
    with pytest.raises(TypeError, match=r"site-2 must be fedrot\.factors\.Factors, got dict"):
        aggregator.accept(state, name="site-2")
    with pytest.raises(TypeError, match=r"reference must be fedrot\.factors\.Factors, got dict"):
        StreamingAggregator(state)
    with pytest.raises(TypeError, match="reference: lam must be a number, got 'auto'"):
        StreamingAggregator(ref, lam="auto")
    with pytest.raises(TypeError, match="bound must be a number, got 'a'"):
        StreamingAggregator(ref, bound="a")
    for weight in (None, torch.ones(2), np.ones(2)):
        with pytest.raises(TypeError, match="site-2: weight must be a number, got"):
            aggregator.accept(uploads[0], weight, name="site-2")
    assert aggregator.clients == 5


def test_the_result_must_fit_its_dtype():
    ref, uploads, _ = problem(2, torch.float32, torch.float16)
    large = Factors({n: A * 1e5 for n, A in uploads[0].A.items()}, uploads[0].B)
    aggregator = filled(ref, [large])
    with pytest.raises(ValueError, match="overflows its dtype"):
        aggregator.finish()
    aggregator.accept(uploads[1], 1e9)
    assert bool(aggregator.finish().A["head"].isfinite().all())
