"""A user's own text and model: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_text_tasks import config_of, write

from fedrot.errors import FedrotError
from fedrot.simulation.rounds import federate, prepare
from fedrot.tasks.encode import tokenizer_of
from fedrot.tasks.text import is_causal


def test_own_classification(tmp_path, roberta):
    file = tmp_path / "own.csv"
    lines = [
        f"{'good' if i % 2 else 'bad'} thing {i},{'pos' if i % 2 else 'neg'},u{i % 3}"
        for i in range(30)
    ]
    file.write_text("review,verdict,user\n" + "\n".join(lines) + "\n")
    config = config_of(
        "text",
        {"clients": {"count": 3, "partition": "column", "column": "user"}},
        model=str(roberta),
        data=str(file),
        text="review",
        label="verdict",
    )
    federation = prepare(config)
    assert federation.data.facts["labels"] == ["neg", "pos"]
    assert (len(federation.data.labels), len(federation.data.test["labels"])) == (24, 6)
    users = federation.data.columns["user"]
    assert [users[rows].unique().tolist() for rows in federation.examples] == [[0], [1], [2]]
    summary = federate(config, tmp_path / "run")
    assert sum(summary["client_examples"]) == 24


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_rare_client_and_label_keep_an_example(tmp_path, roberta, validation):
    """Of 62 examples two are a client's and two have a label, and a fifth is held out, with
    `validation` twice: whatever the seed, three clients and three labels are left."""
    rows = [{"text": f"t {i}", "label": i % 2, "user": i % 2} for i in range(58)]
    rows += [{"text": f"r {i}", "label": 0, "user": 2} for i in range(2)]
    rows += [{"text": f"l {i}", "label": 2, "user": 0} for i in range(2)]
    write(tmp_path / "own.jsonl", rows)
    for seed in range(10):
        config = config_of(
            "text",
            {
                "clients": {"count": 3, "partition": "column", "column": "user"},
                "seed": seed,
                "validation": validation,
            },
            model=str(roberta),
            data=str(tmp_path / "own.jsonl"),
        )
        federation = prepare(config)
        assert len(federation.examples) == 3 and federation.data.classes == 3
        kept = 62 - round(0.2 * 62)
        held = round(validation * kept)
        assert len(federation.data.labels) == kept - held
        assert len(federation.data.test["labels"]) == (held or 62 - kept)


def test_what_clients_are_not_made_of_does_not_choose_the_test_part(tmp_path, roberta):
    """Texts and columns in which most values stand once: the test part has these values too."""
    rows = [
        {
            "text": f"t{i}" if i < 60 else "spam",
            "label": "a" if i < 30 else "b",
            "user": "big" if i < 30 else f"u{i}",
        }
        for i in range(80)
    ]
    write(tmp_path / "own.jsonl", rows)
    task = config_of("text", model=str(roberta), data=str(tmp_path / "own.jsonl")).task
    _, train, test = task._read(0, None)
    assert (len(train["text"]), len(test["text"])) == (64, 16)
    assert len({*test["text"]} - {*train["text"]}) > 8 and len({*test["user"]}) > 8
    message = r"task\.test_fraction=0\.5 of 80 examples are 40, and 29 can"  # 51 users
    with pytest.raises(FedrotError, match=message):
        replace(task, test_fraction=0.5).prepare(0, clients_by="user")


def test_clients_are_made_of_simple_values(tmp_path, roberta):
    rows = [{"text": f"t {i}", "label": i % 2, "tags": ["a"]} for i in range(10)]
    write(tmp_path / "own.jsonl", rows)
    clients = {"count": 1, "partition": "column", "column": "tags"}
    options = {"model": str(roberta), "data": str(tmp_path / "own.jsonl")}
    with pytest.raises(FedrotError, match=r"clients\.column must name a column of the task"):
        prepare(config_of("text", {"clients": clients}, **options))


def test_parts_of_an_own_folder(tmp_path, roberta):
    """The test part is found at any depth, and is never taken from a longer word."""
    rows = [{"text": str(i), "label": i % 2} for i in range(10)]

    def sizes(folder):
        data = config_of("text", model=str(roberta), data=str(folder)).task.prepare(0)
        return len(data.train["labels"]), len(data.test["labels"])

    write(tmp_path / "own" / "contest-train.jsonl", rows)
    assert sizes(tmp_path / "own") == (8, 2)
    write(tmp_path / "hub" / "data" / "train-0.jsonl", rows)
    write(tmp_path / "hub" / "data" / "test-0.jsonl", rows[:3])
    assert sizes(tmp_path / "hub") == (10, 3)


def test_own_generation(tmp_path, llama):
    rows = [{"prompt": f"{i} ->", "answer": f" {i + 1}", "user": i % 2} for i in range(10)]
    write(tmp_path / "train.jsonl", [*rows, {"prompt": "x" * 99, "answer": "y", "user": 0}])
    write(tmp_path / "test.jsonl", rows[:3])
    options = {"model": str(llama), "data": str(tmp_path), "max_length": 32}
    config = config_of("text", **options, max_train=6)
    data = prepare(config).data
    assert len(data.labels) == 6 and len(data.test["labels"]) == 3
    assert data.facts == {"too_long": 1}
    assert set(data.columns) == {"user"}
    # A random model's query and value alone can do little; the loss of the start is 5.68.
    steps = {"local": {"lr": 0.03, "steps": 40}}
    summary = federate(config_of("text", steps, **options), tmp_path / "run")
    assert summary["loss"] < summary["start"]["loss"] - 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task\.model must be given"),
        ({"model": "MODEL"}, r"task\.data must be given"),
        ({"model": "MODEL", "data": "nowhere.csv"}, "there is no file or folder nowhere.csv"),
        ({"model": "MODEL", "data": "FILE", "label": "class"}, "must have the columns text and"),
        (
            {"model": "MODEL", "data": "FILE", "kind": "generation"},
            "has no column prompt; it has text, label",
        ),
        ({"model": "MODEL", "data": "FILE", "test": "OTHER"}, "has the label 'c'"),
        ({"model": "FOLDER", "data": "FILE"}, "must hold config.json and the model's weights"),
    ],
)
def test_what_text_refuses(tmp_path, roberta, options, message):
    write(tmp_path / "own.jsonl", [{"text": "a", "label": "a"}, {"text": "b", "label": "b"}] * 4)
    write(tmp_path / "other.jsonl", [{"text": "a", "label": "c"}])
    paths = {
        "MODEL": str(roberta),
        "FILE": str(tmp_path / "own.jsonl"),
        "OTHER": str(tmp_path / "other.jsonl"),
        "FOLDER": str(tmp_path),
    }
    options = {key: paths.get(value, value) for key, value in options.items()}
    with pytest.raises(FedrotError, match=message):
        config_of("text", **options).task.prepare(0)


A, B = {"text": "a", "label": "a"}, {"text": "b", "label": "b"}
PAIR = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [A, B, {"text": "c", "label": None}],
            [A],
            r"train\.jsonl, row 3, column label: .* missing",
        ),
        ([A, B], [A, {"text": "c"}], r"test\.jsonl, row 2, column label: the value is missing"),
        ([A, B], [{"label": "a", "text": None}], r"test\.jsonl, row 1, column text: .* missing"),
        ([A, {**B, "label": ""}, B], [A], r"train\.jsonl, row 2, column label: .* missing"),
        ([A, B, {**A, "label": ["a"]}], [A], r"row 3, column label: .* number, got \['a'\]"),
        ([A, B], [{"text": "a"}], r"test\.jsonl has no column label"),
        ([A, A], [A], "every training example of task.data=.* has the label 'a'"),
        ([A, B], [{**A, "label": "c"}], "the test part has the label 'c', the training part not"),
        ([PAIR], [{**PAIR, "answer": None}], r"test\.jsonl, row 1, column answer: .* missing"),
        ([A], None, r"task\.test_fraction=0\.2 of the 1 examples of .* leaves none"),
    ],
)
def test_examples_that_text_refuses(tmp_path, roberta, train, test, message):
    write(tmp_path / "train.jsonl", train)
    if test:
        write(tmp_path / "test.jsonl", test)
    with pytest.raises(FedrotError, match=message):
        config_of("text", model=str(roberta), data=str(tmp_path)).task.prepare(0)


def test_an_empty_text_is_an_example(tmp_path, roberta, gpt2):
    """Also where all of a batch are, and the tokenizer makes no token of them."""
    write(tmp_path / "train.jsonl", [A, B, {**B, "text": ""}])
    write(tmp_path / "test.jsonl", [{**A, "text": ""}])
    for model, tokens in ((roberta, "<s></s>"), (gpt2, "</s>")):
        task = config_of("text", model=str(model), data=str(tmp_path)).task
        data = task.prepare(0)
        assert tokenizer_of(model).decode(data.test["input_ids"][0]) == tokens
        assert 0 < task.evaluate(task.load_model(data), data.test)["loss"] < 2


@pytest.mark.parametrize(("name", "limit"), [("roberta", 127), ("gpt2", 64), ("llama", None)])
def test_no_more_tokens_than_positions(tmp_path, request, name, limit):
    """A `task.max_length` beyond them is refused if an example is that long."""
    folder = request.getfixturevalue(name)
    write(tmp_path / "train.jsonl", [A, B])
    write(tmp_path / "test.jsonl", [{"text": "long" * 80, "label": "a"}])

    def loss(length, test):
        options = {"model": str(folder), "data": str(tmp_path), "test": str(tmp_path / test)}
        task = config_of("text", **options, max_length=length).task
        data = task.prepare(0)
        return task.evaluate(task.load_model(data), data.test)["loss"]

    assert loss(300, "train.jsonl") < 2 and loss(limit or 300, "test.jsonl") < 2
    if limit:
        wanted = rf"task\.max_length={limit + 1}: must be at most {limit}, .*{folder.name}"
        with pytest.raises(FedrotError, match=wanted):
            loss(limit + 1, "test.jsonl")


def test_a_model_that_sees_the_answer_writes_none(tmp_path, roberta, llama, gpt2):
    """Its exact match over given answers would not be that of what it writes."""
    write(tmp_path / "train.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)])

    def load(folder):
        task = config_of("text", model=str(folder), data=str(tmp_path)).task
        return task.load_model(task.prepare(0))

    for causal in (llama, gpt2):
        assert is_causal(load(causal), torch.tensor([70, 80, 80]))
    seeing = rf"task\.model={roberta}: a token of RobertaForCausalLM sees those after it"
    with pytest.raises(FedrotError, match=seeing):
        load(roberta)
    shutil.copytree(roberta, decoder := tmp_path / "decoder")
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    assert is_causal(load(decoder), torch.tensor([70, 80, 80]))
