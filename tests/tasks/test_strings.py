"""The embedded generative task: its data, its metric, and that a federation learns it."""

from __future__ import annotations

import pytest
import torch

from fedrot.config import load
from fedrot.simulation.rounds import federate, prepare
from fedrot.tasks.base import IGNORE
from fedrot.tasks.strings import NEW_NAMES, PROMPT, TOKEN, VOCABULARY, Strings


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDROT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


SHORT = {"name": "strings", "pretrain_steps": 1, "train_examples": 400, "test_examples": 200}
MEANING = {
    "ba": lambda x: x,
    "de": lambda x: x + 1,
    "gi": lambda x: x + 3,
    "ko": lambda x: x - 3,
    "lu": lambda x: 9 - x,
}
PLACES = {
    "copy": lambda s: s,
    "left": lambda s: s[1:] + s[:1],
    "right": lambda s: s[-1:] + s[:-1],
    "mirror": lambda s: s[::-1],
}


def test_answers_are_right_and_the_parts_disjoint():
    data = Strings(pretrain_steps=1).prepare(0)
    seen = []
    for part, count in ((data.train, 3000), (data.test, 500)):
        assert part["input_ids"].shape == (count, 12)
        strings = set()
        for ids, labels in zip(part["input_ids"], part["labels"], strict=True):
            words = [VOCABULARY[token] for token in ids.tolist()]
            order, name, *digits, equals, a, b, c, d, end = words
            assert (equals, end) == ("=", "</s>")
            wanted = [MEANING[name](x) % 10 for x in PLACES[order]([int(x) for x in digits])]
            assert [int(x) for x in (a, b, c, d)] == wanted
            assert (labels[:PROMPT] == IGNORE).all() and torch.equal(labels[PROMPT:], ids[PROMPT:])
            strings.add("".join(digits))
        seen.append(strings)
    assert not seen[0] & seen[1]
    assert data.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(data.train["input_ids"][:, 1], data.labels + TOKEN[NEW_NAMES[0]])
    assert data.columns["order"].unique().tolist() == [0, 1, 2, 3]


def test_seed_decides_the_data_and_the_model_unless_that_has_its_own():
    task, fixed = Strings(pretrain_steps=1), Strings(pretrain_steps=1, pretrain_seed=1)
    a, b, again = task.prepare(0), task.prepare(1), task.prepare(0)
    assert a.base == again.base != b.base
    assert fixed.prepare(0).base == b.base
    assert torch.equal(a.train["input_ids"], again.train["input_ids"])
    assert not torch.equal(a.train["input_ids"], b.train["input_ids"])


def test_preset_is_weaker_than_setting_and_options():
    strings = {"task": {"name": "strings"}}
    assert load(strings).local.lr == 0.1
    assert load(strings, {"setting": "one-shot"}).local.lr == 1e-2
    assert load(strings, {"local": {"lr": 0.7}}).local.lr == 0.7
    assert load({"task": {"name": "digits"}}).local.lr == 0.3


def test_columns_partition_a_federation(tmp_path):
    config = load(
        {"task": SHORT, "clients": {"partition": "column", "column": "order", "count": 4}}
    )
    federation = prepare(config)
    orders = federation.data.train["input_ids"][:, 0]
    assert [orders[rows].unique().tolist() for rows in federation.examples] == [
        [TOKEN[order]] for order in PLACES
    ]
    held = prepare(load(config.tree(), {"validation": 0.25}))
    assert sum(len(rows) for rows in held.examples) == 300
    assert len(held.data.columns["order"]) == 300


def test_fedit_learns_new_names(tmp_path):
    """At reduced size: Adam and even clients take a quarter of the rounds."""
    options = {
        "local": {"optimizer": "adam", "lr": 1e-2},
        "rounds": 4,
        "clients": {"count": 3, "partition": "iid"},
    }
    config = load({"task": {"name": "strings"}, "method": {"name": "fedit"}}, options)
    summary = federate(config, tmp_path / "run")
    assert summary["pretrained_accuracy"] > 0.95
    assert summary["start"]["accuracy"] < 0.2
    assert summary["accuracy"] > 0.6
