"""Sequences of clients that train together: whose masks, and which models do not allow it."""

from __future__ import annotations

import json

import pytest
import torch

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.options import merge
from fedrot.simulation import rounds
from fedrot.simulation.adapter import set_factors
from fedrot.simulation.rounds import prepare, train_round
from fedrot.simulation.seeding import generator

LOCAL = {"lr": 0.1, "steps": 3, "batch_size": 4}
CLIENTS = {"count": 3, "partition": "column", "column": "user"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Every client's texts have a length of their own."""
    file = tmp_path_factory.mktemp("own") / "own.jsonl"
    rows = [
        {"text": ("good " if i % 2 else "bad ") * (1 + 3 * (i % 3)), "label": i % 2, "user": i % 3}
        for i in range(36)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configured(model, texts, **local):
    task = {"name": "text", "model": str(model), "data": str(texts)}
    lora = {"dropout": local.pop("dropout", 0.0)}
    return load(
        merge({"task": task, "clients": CLIENTS, "lora": lora, "local": LOCAL}, {"local": local})
    )


def trained(config):
    federation = prepare(config)
    start = federation.start()
    for B in start.factors.B.values():
        B.fill_(0.05)
    return train_round(federation, start).factors


def furthest(a, b) -> float:
    pairs = zip(a, b, strict=True)
    return max(float((x.B[m] - y.B[m]).abs().max()) for x, y in pairs for m in x.B)


def test_masks_do_not_depend_on_the_lengths_of_others(roberta, texts):
    together = trained(configured(roberta, texts, dropout=0.3))
    assert furthest(together, trained(configured(roberta, texts, dropout=0.3, together=1))) < 1e-7
    assert furthest(together, trained(configured(roberta, texts, dropout=0.3, together=2))) < 1e-7
    assert furthest(together, trained(configured(roberta, texts))) > 1e-5


def test_a_model_that_shares_rows_trains_one_client_at_a_time(deberta, roberta, texts, monkeypatch):
    assert prepare(configured(roberta, texts)).config.local.together is None
    config = configured(deberta, texts)
    federation = prepare(config)
    assert federation.config.local.together == 1
    assert not any(module._forward_pre_hooks for module in federation.model.modules())
    with pytest.raises(FedrotError, match=r"local\.together must be 1 .*got 2: .*query_proj is"):
        prepare(configured(deberta, texts, together=2))

    # As one client trains by PEFT's own forward and backward.
    start = federation.start()
    for B in start.factors.B.values():
        B.fill_(0.05)
    mine = train_round(federation, start).factors[1]
    model = set_factors(federation.model, start.factors)
    named = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.SGD([p.requires_grad_() for _, p in named], LOCAL["lr"])
    draws, own = generator(0, "batches", 0, 1), federation.examples[1]
    for rows in own[torch.randint(len(own), (3, 4), generator=draws)]:
        batch = {key: value[rows] for key, value in federation.data.train.items()}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for name, parameter in named:
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        factors = mine.A if "lora_A" in name else mine.B
        torch.testing.assert_close(factors[module], parameter.detach(), rtol=0, atol=5e-5)
    # Two together would have trained something else, without a word.
    monkeypatch.setattr(rounds, "mixed_layer", lambda model, train: None)
    assert furthest([mine], [trained(configured(deberta, texts, together=2))[1]]) > 1e-3
