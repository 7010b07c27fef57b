"""The aggregator that sees one client at a time, against the operator that sees all."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import pytest
import torch
from clients import LAYERS, check, filled, problem, spoiled, tensors
from problems import assert_close
from safetensors.torch import load_file, save_file

from fedrot import streaming
from fedrot.factors import Factors
from fedrot.streaming import StreamingAggregator
from fedrot_kernels.backends import reference

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = [10.0, 20.0, 0.0, 31.0, 7.0]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def test_options_agree_by_value():
    ref, uploads, inputs = problem()
    aggregator = filled(ref, uploads[:2], lam=1)
    aggregator.merge(filled(ref, uploads[2:], lam=1.0))
    check(aggregator.finish(), inputs, lam=1.0)


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
