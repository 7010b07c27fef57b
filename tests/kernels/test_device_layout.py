"""How a call is laid out for a GPU: what every kernel will read, checked without one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import planted

from fedrot_kernels.backends import gpu
from fedrot_kernels.checks import ALIGN_MODES
from fedrot_kernels.plan import Flat

LAYER = ["d", "k", "r", "ref_A", "ref_A_stride", "ref_B", "ref_B_stride"]
LAYER += ["out_A", "out_A_stride", "out_B", "out_B_stride", "first_unit", "units"]
CLIENT = ["A", "A_stride", "B", "B_stride", "rank", "R"]
UNIT = ["layer", "side", "begin", "end", "slot"]


def rows(layout: gpu.Layout, begin: int, end: int, fields: list[str]) -> list[dict[str, int]]:
    values = layout.table[begin:end].reshape(-1, len(fields)).tolist()
    return [dict(zip(fields, row, strict=True)) for row in values]


def sections(layout: gpu.Layout) -> tuple[list[dict[str, int]], ...]:
    s = layout.sections
    return (
        rows(layout, s.layers, s.clients, LAYER),
        rows(layout, s.clients, s.covariance_units, CLIENT),
        rows(layout, s.covariance_units, s.apply_units, UNIT),
        rows(layout, s.apply_units, s.size, UNIT),
    )


def positions(units, side, layer):
    return Counter(
        p
        for unit in units
        if unit["side"] == side and unit["layer"] == layer
        for p in range(unit["begin"], unit["end"])
    )


def outputs(inputs):
    return [torch.empty_like(t) for t in inputs.ref_A], [torch.empty_like(t) for t in inputs.ref_B]


@given(
    clients=st.integers(1, 5),
    shapes=st.lists(
        st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 20)),
        min_size=1,
        max_size=4,
    ),
    align=st.sampled_from(ALIGN_MODES),
    cache_bytes=st.sampled_from([1, 100_000, 1 << 40]),
)
@settings(max_examples=60, deadline=None)
def test_every_position_is_visited_once(clients, shapes, align, cache_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_cache_bytes", lambda device: cache_bytes)
        inputs = planted(clients, shapes, torch.float32)
        layout = gpu.Layout(tuple(inputs), None, 0.4, align, out=outputs(inputs))
    layers, _, covariance, apply = sections(layout)

    for layer, (d, k, r) in enumerate(shapes):
        assert (layers[layer]["d"], layers[layer]["k"], layers[layer]["r"]) == (d, k, r)
        for side, size in ((0, k), (1, d)):
            wanted = Counter(range(size))
            aligned = align == "joint" or ALIGN_MODES.index(align) == side + 1
            assert positions(covariance, side, layer) == (wanted if aligned else Counter())
            assert positions(apply, side, layer) == wanted
        first, count = layers[layer]["first_unit"], layers[layer]["units"]
        assert [u for u in covariance if u["layer"] == layer] == covariance[first : first + count]

    # Slots neither overlap nor leave the workspace.
    slots = sorted((u["slot"], clients * shapes[u["layer"]][2] ** 2) for u in covariance)
    ends = [slot + size for slot, size in slots]
    assert [slot for slot, _ in slots] == [0, *ends[:-1]]
    assert layout.partials.numel() == ends[-1]

    # Launches go through both lists once; a layer's outputs come in a launch after its covariance.
    launched_at = {}
    at = [0, 0]
    for j, (c0, c1, a0, a1) in enumerate(layout.launches):
        assert [c0, a0] == at
        at = [c1, a1]
        launched_at.update({covariance[u]["layer"]: j for u in range(c0, c1)})
        for u in range(a0, a1):
            assert launched_at[apply[u]["layer"]] == j - 1
    assert at == [len(covariance), len(apply)]
    if cache_bytes == 1:
        assert len(layout.launches) == len(shapes) + 1
    if cache_bytes == 1 << 40:
        assert len(layout.launches) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_addresses(dtype):
    ranks = [4, 1]
    shapes = [(9, 14, 4), (31, 8, 4)]
    inputs = planted(2, shapes, dtype, ranks=ranks)
    wide = inputs.map(lambda t: torch.nn.functional.pad(t, (1, 2, 1, 2))[1:-2, 1:-2])
    out = outputs(wide)
    layout = gpu.Layout(tuple(wide), None, 0.4, "joint", out=out)
    assert layout.table[: layout.sections.layers].tolist() == [0, 0]
    layers, clients, _, _ = sections(layout)
    for layer, row in enumerate(layers):
        for name, t in zip(
            ["ref_A", "ref_B", "out_A", "out_B"], [wide.ref_A, wide.ref_B, *out], strict=True
        ):
            assert row[name] == t[layer].data_ptr()
            assert row[f"{name}_stride"] == t[layer].stride(0)
    R = layout.rotations.data_ptr()
    for i, row in enumerate(clients):
        for name, tensors in (("A", wide.lora_A), ("B", wide.lora_B)):
            assert row[name] == tensors[i].data_ptr()
            assert row[f"{name}_stride"] == tensors[i].stride(0)
        assert row["rank"] == tensors[i].shape[1]
        assert row["R"] == R
        R += row["rank"] * 4 * layout.dtype.itemsize
    assert layout.rotations.data_ptr() + layout.rotations.nbytes == R


def test_rotations_alone():
    shapes = [(9, 14, 4), (31, 8, 2)]
    inputs = planted(3, shapes, torch.float32)
    layout = gpu.Layout(tuple(inputs), None, 0.4, "B")
    layers, clients, covariance, apply = sections(layout)
    assert apply == [] and [u["side"] for u in covariance] == [1, 1]
    assert [row["R"] for row in clients] == [R.data_ptr() for R in layout.aligned]
    assert [R.shape for R in layout.aligned] == [(r, r) for _ in range(3) for _, _, r in shapes]
    assert [row["out_A"] for row in layers] == [0, 0]
    assert layout.launches == [[0, 2, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_weights_are_read_again(dtype):
    inputs = planted(2, [(5, 6, 2)], torch.float32)
    weights = torch.tensor([1, 2, 3, 4], dtype=dtype)[::2] if dtype == torch.int64 else None
    weights = torch.tensor([1, 3], dtype=dtype) if weights is None else weights
    layout = gpu.Layout(tuple(inputs), weights, 0.4, "joint", out=outputs(inputs))
    weights.copy_(torch.tensor([5, 7]))
    layout.refresh()
    assert layout.weights.dtype == torch.float64
    assert layout.weights.tolist() == [5.0, 7.0]


def test_clients_can_be_moved():
    ref_A, ref_B = [torch.randn(2, 6), torch.randn(1, 3)], [torch.randn(5, 2), torch.randn(4, 1)]
    flat = Flat([torch.randn(40), torch.randn(40)], [(20, 3), (36, 32)], [(5, 6, 2), (4, 3, 1)])
    inputs = (*flat.factors(), ref_A, ref_B)
    layout = gpu.Layout(inputs, None, 0.4, "joint", flat=flat)
    _, clients, _, _ = sections(layout)
    assert [(row["A"], row["B"]) for row in clients] == [(80, 12), (144, 128)] * 2
    flat.buffers = [torch.randn(40), torch.randn(40)]
    layout.rebind()
    assert layout.table[:2].tolist() == [b.data_ptr() for b in flat.buffers]
