"""examples/flower in this process; test_deployment.py runs it as it is meant to run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tomllib
import torch
from flwr.app import Context, RecordDict
from in_process import InProcess

from fedrot.adapters import read_adapter
from fedrot.adapters.layers import factor_keys
from fedrot.config import load
from fedrot.errors import FedrotError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower"


@pytest.fixture
def run(monkeypatch, tmp_path_factory):
    """The app with other options: the adapter that it leaves, and the last accuracy."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("FEDROT_CACHE", str(tmp_path_factory.getbasetemp() / "flower-cache"))
    import digits
    from digits import client, server

    monkeypatch.setattr(
        digits, "load", lambda options: load({**options, "task": {"pretrain_steps": 100}})
    )
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def app(**options):
        folder = tmp_path_factory.mktemp("run") / "adapter"
        chosen = {**config, "clients": 2, "out": str(folder), **options}
        grid = InProcess({1: client.app, 2: client.app})
        for node, context in grid.contexts.items():
            context.node_config, context.run_config = {"partition-id": node - 1}, chosen
        context = Context(1, 0, {}, RecordDict(), chosen)
        server.app(grid, context)
        setup = digits.federation(context)
        adapter = read_adapter(folder)
        digits.server.set_peft_model_state_dict(setup.model, adapter.tensors)
        return adapter.tensors, setup.config.task.evaluate(setup.model, setup.data.test)["accuracy"]

    yield app
    torch.set_num_threads(before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "digits"]:
        del sys.modules[name]


def test_learns(run):
    """From 2 % of five classes that the model has not seen."""
    _, accuracy = run(rounds=2, steps=20)
    assert accuracy > 0.3


def test_three_ways_to_one_adapter_that_plain_averaging_misses(run):
    """Every client uploads in a basis of its own."""
    options = {"rounds": 1, "steps": 3, "regauge": True, "lam": 1.0}
    around, _ = run(method="fedrot", **options)
    for method in ("fused", "mod"):
        other, _ = run(method=method, **options)
        for key, tensor in around.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=1e-4)
    plain, _ = run(method="fedavg", **options)
    for A, B in factor_keys(around).values():
        product = around[B] @ around[A]
        assert (plain[B] @ plain[A] - product).norm() > 0.1 * product.norm()


def test_unknown_method(run):
    with pytest.raises(FedrotError, match="method must be fedrot, fused, mod or fedavg, got 'x'"):
        run(method="x")
