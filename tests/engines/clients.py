"""Small adapters of several clients, and what their average has to be."""

from __future__ import annotations

import itertools

import torch
from problems import OUTPUT_TOLERANCE, assert_close, planted

from fedrot.factors import Factors
from fedrot.streaming import StreamingAggregator
from fedrot_kernels.backends import reference

SHAPES = [(9, 14, 4), (31, 8, 2), (5, 5, 5)]
LAYERS = ["encoder.q", "encoder.v", "head"]


def problem(clients=5, dtype=torch.float32, ref_dtype=None, **options):
    """``(reference, clients, inputs)``, the inputs being those of the operator."""
    inputs = planted(clients, SHAPES, dtype, **options)
    for side in (inputs.ref_A, inputs.ref_B):
        side[:] = [t.to(ref_dtype or dtype) for t in side]
    n = len(SHAPES)

    def factors(A, B):
        return Factors(dict(zip(LAYERS, A, strict=True)), dict(zip(LAYERS, B, strict=True)))

    uploads = [
        factors(inputs.lora_A[n * i : n * i + n], inputs.lora_B[n * i : n * i + n])
        for i in range(clients)
    ]
    return factors(inputs.ref_A, inputs.ref_B), uploads, inputs


def tensors(factors):
    return [*factors.A.values(), *factors.B.values()]


def check(factors, inputs, weights=None, tolerance=None, **options):
    """``factors`` are what the float64 reference makes of ``inputs``."""
    w = None if weights is None else torch.tensor(weights)
    A, B = reference.align_aggregate(*inputs, w, **options)
    assert list(factors.A) == list(factors.B) == LAYERS
    assert_close(tensors(factors), [*A, *B], tolerance or OUTPUT_TOLERANCE[A[0].dtype])


def spoiled(client, layer, value, side="B"):
    """A copy of the client with one value replaced."""
    copy = Factors(
        {name: t.clone() for name, t in client.A.items()},
        {name: t.clone() for name, t in client.B.items()},
    )
    getattr(copy, side)[layer][1, 1] = value
    return copy


def filled(ref, uploads, weights=None, **options):
    """A streaming aggregator that has accepted the clients."""
    aggregator = StreamingAggregator(ref, **options)
    for client, weight in zip(uploads, weights or itertools.repeat(1.0), strict=False):
        assert aggregator.accept(client, weight)
    return aggregator
