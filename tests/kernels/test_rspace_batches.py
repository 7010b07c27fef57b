"""Averages in r-space, worked on by batches of layers: same results, errors of the whole call."""

from __future__ import annotations

import math

import pytest
import torch
from problems import Inputs, assert_close, planted, strangers

from fedrot_kernels import rspace
from fedrot_kernels.rspace import Blocks


def test_layers_of_several_ranks_in_several_batches(monkeypatch):
    shapes = [(20, 30, 4), (9, 5, 2), (31, 12, 4), (8, 8, 1), (10, 7, 4)]
    inputs = strangers(3, shapes)
    expected = rspace.aggregate(*inputs, align="optimal")
    monkeypatch.setattr(rspace.blocks, "BYTES", 5000)  # two layers of rank 4
    for actual, wanted in zip(rspace.aggregate(*inputs, align="optimal"), expected, strict=True):
        assert_close(actual, wanted, 1e-12)
    for layer in range(5):  # and each as if it were alone
        alone = Inputs(*(t[layer :: len(shapes)] for t in inputs))
        A, _ = rspace.aggregate(*alone, align="gpa")
        assert_close(A, [rspace.aggregate(*inputs, align="gpa")[0][layer]], 1e-12)


def test_bad_arguments():
    inputs = planted(2, [(9, 14, 4), (31, 8, 2)])
    with pytest.raises(ValueError, match="align must be one of joint, A, B, gpa, optimal, got 'x'"):
        rspace.aggregate(*inputs, align="x")
    with pytest.raises(ValueError, match="lam must be a number or auto, got 'best'"):
        rspace.aggregate(*inputs, lam="best")
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got nan"):
        rspace.aggregate(*inputs, lam=math.nan)
    with pytest.raises(TypeError, match="lam must be a number, got None"):
        rspace.aggregate(*inputs, lam=None)
    with pytest.raises(ValueError, match=r"layers must have one rank, got \[2, 4\]"):
        Blocks.of(*inputs)
    with pytest.raises(ValueError, match="lora_A must hold clients x layers"):
        rspace.aggregate(inputs.lora_A[:3], inputs.lora_B[:3], inputs.ref_A, inputs.ref_B)
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite"):
        rspace.aggregate(*inputs, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"weights must be \(2,\)"):
        rspace.aggregate(*inputs, torch.ones(3))
    inputs.lora_B[3][0, 0] = math.nan
    with pytest.raises(ValueError, match="lora_B holds a non-finite value for client 1, layer 1"):
        rspace.aggregate(*inputs)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "ref_A", "ref_B"])
def test_layers_are_named_by_their_place_among_all(name, monkeypatch):
    """Not by that in the batch of layers of one rank in which they are worked on."""
    monkeypatch.setattr(rspace.blocks, "BYTES", 5000)  # two layers of rank 4
    shapes = [(20, 30, 4), (9, 5, 2), (31, 12, 4), (8, 8, 1), (10, 7, 4)]
    client = "client 1, " if name.startswith("lora") else ""
    for layer in range(5):
        at = 5 * bool(client) + layer
        inputs = strangers(3, shapes)
        getattr(inputs, name)[at][0, 0] = math.inf
        with pytest.raises(ValueError, match=f"{name} holds a non-finite .* {client}layer {layer}"):
            rspace.aggregate(*inputs)
        getattr(inputs, name)[at] = torch.ones(40, 40, 1, dtype=torch.float64)
        where = rf"{client}layer {layer}|ref_B\[{layer}\]"
        with pytest.raises(ValueError, match=where):
            rspace.aggregate(*inputs)


def test_overflow_names_layer_and_client():
    shapes = [(20, 30, 4), (9, 5, 2), (31, 12, 4)]
    inputs = planted(3, shapes, torch.float32, noise=3.0)
    inputs.lora_B[3 * 1 + 2].mul_(1e25)
    with pytest.raises(ValueError, match=r"overflows .*\(layer 2; the largest client there is 1\)"):
        rspace.aggregate(*inputs)
