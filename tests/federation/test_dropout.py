"""Dropout of the LoRA input: which numbers are dropped, and that they are the client's own."""

from __future__ import annotations

import json

import pytest
import torch
from small import SMALL

from fedrot.config import load
from fedrot.options import parse_overrides
from fedrot.simulation.grouped import grouped
from fedrot.simulation.local import train_clients
from fedrot.simulation.rounds import federate, prepare, train_round
from fedrot.simulation.seeding import generator


def configured(*options):
    return load(parse_overrides([*SMALL, "lora.dropout=0.25", *options]))


@pytest.fixture(scope="module")
def federation():
    return prepare(configured())


def test_a_grouped_layer_drops_what_its_clients_generators_say(federation):
    start = federation.start().factors
    module = next(iter(start.A))
    draws = [generator(3, "dropout", i) for i in range(2)]
    x = torch.randn(6, 5, 32)
    with grouped(federation.model, [start] * 2, [{}] * 2, draws) as layers:
        layer = layers.lora[module]
        layer.B.copy_(torch.randn(layer.B.shape))
        y = layer(x)
    for client in range(2):
        mask = torch.rand(15, 32, generator=generator(3, "dropout", client)) >= 0.25
        assert 0.15 < float((~mask).float().mean()) < 0.35
        own = x[3 * client : 3 * client + 3].reshape(15, 32)
        update = (own * mask / 0.75) @ layer.A[client].T @ layer.B[client].T * layer.scaling
        expected = layer.base(own) + update
        torch.testing.assert_close(y[3 * client : 3 * client + 3].reshape(15, -1), expected)


def test_masks_are_the_clients_own(federation):
    """Neither the other clients nor the order matter; the next round draws others."""
    start = federation.start()
    together = train_round(federation, start).factors
    alone = train_round(prepare(configured("local.together=1")), start).factors
    plain = train_round(prepare(configured("lora.dropout=0")), start).factors
    for a, b, c in zip(together, alone, plain, strict=True):
        for name in a.B:
            torch.testing.assert_close(a.B[name], b.B[name], rtol=0, atol=1e-6)
            assert float((a.B[name] - c.B[name]).norm()) > 1e-4
    again = train_round(federation, start).factors
    assert all(torch.equal(again[0].B[name], together[0].B[name]) for name in together[0].B)


def test_a_run_with_dropout_repeats_and_says_so(tmp_path):
    options = ["rounds=2"]
    losses = [federate(configured(*options), tmp_path / name)["loss"] for name in "ab"]
    assert losses[0] == losses[1]
    stored = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert stored["lora_dropout"] == 0.25


def test_dropout_needs_generators(federation):
    start, rows = federation.start().factors, federation.examples[0][:8].view(1, 8)
    with pytest.raises(ValueError, match=r"dropout must hold a generator a client: .*drops 0\.25"):
        train_clients(
            federation.model, [start], federation.data.train, [rows], federation.config.local
        )
