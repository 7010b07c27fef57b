"""The aggregator that sees one client at a time, against the operator that sees all."""

from __future__ import annotations

import itertools
import math
import random
import weakref
from pathlib import Path

import pytest
import torch
from clients import LAYERS, check, problem, spoiled, tensors
from problems import assert_close
from safetensors.torch import load_file, save_file

from fedrot import streaming
from fedrot.factors import Factors
from fedrot.streaming import StreamingAggregator
from fedrot_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = [10.0, 20.0, 0.0, 31.0, 7.0]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def filled(ref, uploads, weights=None, **options):
    aggregator = StreamingAggregator(ref, **options)
    for client, weight in zip(uploads, weights or itertools.repeat(1.0), strict=False):
        assert aggregator.accept(client, weight)
    return aggregator


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_operator_for_all_dtypes_and_ranks(dtype, ref_dtype):
    ref, uploads, inputs = problem(dtype=dtype, ref_dtype=ref_dtype, ranks=[4, 1, 3, 5, 2])
    check(filled(ref, uploads, WEIGHTS).finish(), inputs, WEIGHTS)


@pytest.mark.parametrize("align", ["joint", "A", "B"])
@pytest.mark.parametrize("lam, proper", [(0.0, True), (0.4, False), (1.0, True)])
def test_is_the_operator_for_all_options(align, lam, proper):
    ref, uploads, inputs = problem()
    options = {"align": align, "lam": lam, "proper": proper}
    check(filled(ref, uploads, WEIGHTS, **options).finish(), inputs, WEIGHTS, **options)


def test_by_hand():
    """Plain averages of two clients, 3 to 1, one of them of rank 1."""
    ref = Factors({"m": torch.eye(2)}, {"m": torch.ones(1, 2)})
    aggregator = StreamingAggregator(ref, lam=0.0)
    aggregator.accept(Factors({"m": torch.tensor([[3.0, 0]])}, {"m": torch.tensor([[2.0]])}), 3)
    aggregator.accept(
        Factors({"m": torch.tensor([[1.0, 4], [0, 4]])}, {"m": torch.tensor([[0.0, 4]])}), 1
    )
    out = aggregator.finish()
    assert out.A["m"].tolist() == [[2.5, 1], [0, 1]] and out.B["m"].tolist() == [[1.5, 1]]
    assert (aggregator.clients, aggregator.weight) == (2, 4.0)


def test_a_rounded_reference_rounds_the_result_once():
    """One client at a time and rounded each time, bfloat16 would be off by more than it is."""
    ref, uploads, inputs = problem(200, torch.bfloat16)
    exact, _ = reference.align_aggregate(*inputs.map(torch.Tensor.double))
    ours = filled(ref, uploads).finish().A[LAYERS[0]]
    assert ours.dtype == torch.bfloat16
    off = ours.double() - exact[0]
    assert bool((off.abs() <= 2.0**-8 * exact[0].abs() + 1e-5).all())


def test_order_and_split_do_not_matter():
    ref, uploads, inputs = problem(150)
    weights = [1.0 + 40 * (i % 7) for i in range(150)]
    pairs = list(zip(uploads, weights, strict=True))
    random.Random(0).shuffle(pairs)
    shuffled = filled(ref, *zip(*pairs, strict=True))
    check(shuffled.finish(), inputs, weights)

    whole = filled(ref, uploads[:1], weights[:1])
    for part in (slice(1, 3), slice(3, 3), slice(3, 120)):
        whole.merge(filled(ref, uploads[part], weights[part]))
    whole.merge(filled(ref, uploads[120:], weights[120:]).state_dict())
    assert (whole.clients, whole.weight) == (150, sum(weights))
    assert_close(tensors(whole.finish()), tensors(shuffled.finish()), 3e-7)


def test_merged_aggregators_stay_apart():
    ref, uploads, inputs = problem()
    first, second = filled(ref, uploads[:2]), filled(ref, uploads[2:4])
    first.merge(second)
    second.accept(uploads[0], 100.0)
    first.accept(uploads[4])
    check(first.finish(), inputs)
    first.merge(first)
    assert first.clients == 10
    check(first.finish(), inputs)


def test_finish_is_no_end():
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads[:3])
    early = aggregator.finish()
    for t in tensors(early):
        t.fill_(torch.nan)
    for client in uploads[3:]:
        aggregator.accept(client)
    check(aggregator.finish(), inputs)


def test_nothing_is_modified_or_aliased():
    ref, uploads, inputs = problem()
    before = [t.clone() for t in [*tensors(ref), *tensors(uploads[0])]]
    aggregator = filled(ref, uploads[:1])
    assert all(map(torch.equal, [*tensors(ref), *tensors(uploads[0])], before))
    expected = aggregator.finish()
    kept = [t.clone() for t in tensors(uploads[1])]
    aggregator.accept(uploads[1])
    for t in [*tensors(ref), *tensors(uploads[1])]:
        t.fill_(1e3)
    aggregator.accept(uploads[2])
    for t, value in zip(tensors(uploads[1]), kept, strict=True):
        t.copy_(value)
    for t, value in zip(tensors(ref), before, strict=False):
        t.copy_(value)
    for client in uploads[3:]:
        aggregator.accept(client)
    check(aggregator.finish(), inputs)
    assert not torch.equal(expected.A["head"], aggregator.finish().A["head"])


def test_parameters_give_no_graph():
    ref, uploads, inputs = problem()
    for factors in (ref, *uploads):
        for side in (factors.A, factors.B):
            side.update({name: torch.nn.Parameter(t) for name, t in side.items()})
    out = filled(ref, uploads, WEIGHTS).finish()
    assert not any(t.requires_grad for t in tensors(out))
    check(out, inputs, WEIGHTS)


def test_layers_go_by_name():
    ref, uploads, inputs = problem()
    turned = [Factors(dict(reversed(c.A.items())), dict(reversed(c.B.items()))) for c in uploads]
    check(filled(ref, turned, WEIGHTS).finish(), inputs, WEIGHTS)


@pytest.mark.parametrize("at", [0, 3, 70])
def test_goes_on_from_a_checkpoint(tmp_path, at):
    ref, uploads, _ = problem(100, torch.bfloat16)
    aggregator = filled(ref, uploads[:at], nonfinite="drop")
    with pytest.warns(RuntimeWarning, match="left out"):
        aggregator.accept(Factors(ref.A, {name: B * torch.inf for name, B in ref.B.items()}))
    save_file(aggregator.state_dict(), tmp_path / "state.safetensors")

    again = filled(ref, uploads[5:9])
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert (again.clients, again.weight, again.dropped) == (at, at, 1)
    for client in uploads[at:]:
        assert aggregator.accept(client, 3.0) and again.accept(client, 3.0)
    assert all(map(torch.equal, aggregator.mean(), again.mean()))
    assert again.clients == 100


def test_a_state_is_a_copy():
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads[:4])
    state = aggregator.state_dict()
    aggregator.accept(uploads[4], 1e6)
    again = StreamingAggregator(ref)
    again.load_state_dict(state)
    for t in state.values():
        t.zero_()
    again.accept(uploads[4])
    check(again.finish(), inputs)


def test_bad_states():
    ref, uploads, _ = problem()
    aggregator = filled(ref, uploads)
    expected, state = aggregator.state_dict(), aggregator.state_dict()
    key = "mean/A/encoder.q"
    bad = {
        "missing .'weight'., unknown .'x'.": {**state, "x": state["weight"]},
        f"{key} must be .4, 14. and finite, got .1,": {**state, key: torch.ones(1)},
        f"{key} must be .4, 14. and finite": {**state, key: state[key] * torch.nan},
        "weight must be non-negative and finite, got -1": {**state, "weight": torch.tensor(-1.0)},
        "same reference and options": filled(ref, uploads, lam=0.5).state_dict(),
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


def test_options_agree_by_value():
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads[:2], lam=1)
    aggregator.merge(filled(ref, uploads[2:], lam=1.0))
    check(aggregator.finish(), inputs, lam=1.0)


def test_the_result_must_fit_its_dtype():
    ref, uploads, _ = problem(2, torch.float32, torch.float16)
    large = Factors({n: A * 1e5 for n, A in uploads[0].A.items()}, uploads[0].B)
    aggregator = filled(ref, [large])
    with pytest.raises(ValueError, match="overflows its dtype"):
        aggregator.finish()
    aggregator.accept(uploads[1], 1e9)
    assert bool(aggregator.finish().A["head"].isfinite().all())


@pytest.mark.parametrize(
    "weights",
    [[1e-300, 2e-300, 3e-300], [1e300, 2e307, 3e306], [1.0, 1e25, 1e-9], [1e-30, 0.0, 1e30]],
    ids=str,
)
def test_weights_of_any_size(weights):
    """As for the operator, only their ratios count."""
    ref, uploads, inputs = problem(3)
    check(filled(ref, uploads, weights).finish(), inputs, [w / max(weights) for w in weights])


def test_no_sum_overflows():
    """What the operator averages the aggregator averages: 100 clients near the end of float32."""
    ref, uploads, inputs = problem(100, noise=0.01)
    large = [Factors({n: A * 5e37 for n, A in c.A.items()}, c.B) for c in uploads]
    inputs.lora_A[:] = [A * 5e37 for A in inputs.lora_A]
    weights = [10.0**i for i in range(5)] * 20
    check(filled(ref, large, weights, align="B").finish(), inputs, weights, align="B")


def test_many_clients_lose_no_digits():
    """5,000 that agree but for noise: float32 alone is off by 10 roundings and more."""
    g = torch.Generator().manual_seed(0)
    mean, plain = streaming._Mean([torch.zeros(8)]), torch.zeros(8)
    exact = torch.zeros(8, dtype=torch.float64)
    for _ in range(5_000):
        x = 1 + 0.1 * torch.randn(8, generator=g)
        mean.add([x], 3.0)
        plain.add_(x, alpha=3.0)
        exact += x.double()
    ours = float((mean.settled()[0] * 5_000 / exact - 1).abs().max())
    theirs = float((plain.double() / 3 / exact - 1).abs().max())
    eps = torch.finfo(torch.float32).eps
    assert ours < eps / 2 and theirs > 5 * eps


def test_memory_does_not_grow():
    ref, uploads = problem(130)[:2]
    aggregator = StreamingAggregator(ref)

    def held():
        total = aggregator._total
        lists = (*aggregator._reference, *aggregator._aligned, total._mean, total._sum)
        return sum(t.untyped_storage().nbytes() for tensors in lists for t in tensors)

    begin, elements = held(), sum(t.numel() for t in tensors(ref))
    assert begin == elements * (4 + 4 + 4 + 8)
    gone = [weakref.ref(t) for client in uploads for t in tensors(client)]
    while uploads:
        aggregator.accept(uploads.pop())
        assert held() == begin
    assert not any(t() is not None for t in gone[1:-6])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
def test_on_a_gpu():
    """There the operator raises for no value, so the aggregator looks."""
    ref, uploads, inputs = problem()

    def on(factors, device):
        return Factors(
            {n: t.to(device) for n, t in factors.A.items()},
            {n: t.to(device) for n, t in factors.B.items()},
        )

    aggregator = filled(on(ref, "cuda"), [on(c, "cuda") for c in uploads[:3]])
    with pytest.raises(ValueError, match="client 3: lora_B holds a non-finite value for layer"):
        aggregator.accept(on(spoiled(uploads[0], "head", torch.nan), "cuda"))
    aggregator.merge(filled(ref, uploads[3:]))
    check(on(aggregator.finish(), "cpu"), inputs)


def test_the_example_of_the_page():
    text = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
    scope: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    assert scope["aggregator"].weight == 400.0
    assert scope["factors"].A["q"].shape == (4, 32)
