"""Whole federations of the hub tasks and of own text: tiny local models, files as the hub's."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.simulation.adapter import draw_factors, set_factors
from fedrot.simulation.local import draw_batches
from fedrot.simulation.rounds import federate, prepare, train_round
from fedrot.simulation.seeding import generator
from fedrot.tasks import TASKS
from fedrot.tasks.base import IGNORE, trim
from fedrot.tasks.cache import quiet
from fedrot.tasks.encode import generation, tokenizer_of
from fedrot.tasks.execute import passes
from fedrot.tasks.generation import final_number, program

LOCAL = {"optimizer": "adam", "lr": 0.01, "steps": 2, "batch_size": 4}
TINY = {"rounds": 1, "clients": {"count": 2}, "local": LOCAL}
GLUE = {
    "sst2": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}


def write(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(task, *trees, **options):
    return load({"task": {"name": task, **options}}, TINY, *trees)


@pytest.mark.parametrize("task", GLUE)
def test_glue_as_the_hub_lays_it_out(tmp_path, roberta, task):
    classes = 3 if task == "mnli" else 2
    rows = [
        {**{name: f"{name} {i}" * (1 + i % 3) for name in GLUE[task]}, "label": i % classes}
        for i in range(12)
    ]
    test = "validation_matched" if task == "mnli" else "validation"
    glue = tmp_path / "glue"
    write(glue / task / "train-00000-of-00001.parquet", rows)
    write(glue / task / f"{test}-00000-of-00001.parquet", rows[:6])
    hidden = [{**row, "label": -1} for row in rows]
    write(glue / task / "test-00000-of-00001.parquet", hidden)
    if task == "mnli":
        write(glue / task / "validation_mismatched-00000-of-00001.parquet", hidden)

    config = config_of(task, model=str(roberta), data=str(glue), max_length=64)
    federation = prepare(config)
    data = federation.data
    assert data.labels.tolist() == [i % classes for i in range(12)]
    assert federation.model.config.num_labels == classes
    ids = data.train["input_ids"][1][data.train["attention_mask"][1].bool()].tolist()
    words = tokenizer_of(roberta).decode(ids)
    assert words == "<s>" + "</s></s>".join(rows[1][name] for name in GLUE[task]) + "</s>"
    summary = federate(config, tmp_path / "run")
    assert summary["test_examples"] == 6 and summary["loss"] < 2
    assert summary["loss"] != summary["start"]["loss"]

    # Elsewhere: the base model of the hub, and the adapter with the trained head.
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        base = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=classes)
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert config.task.evaluate(model, data.test)["loss"] == pytest.approx(summary["loss"])


def test_head_follows_the_seed(tmp_path, roberta):
    write(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 3)
    options = {"model": str(roberta), "data": str(tmp_path / "train.jsonl")}

    def head(seed):
        federation = prepare(config_of("text", {"seed": seed}, **options))
        return federation.model.get_base_model().classifier.out_proj.weight

    assert torch.equal(head(0), head(0)) and not torch.equal(head(0), head(1))


def test_presets_are_the_papers():
    config = load({"task": {"name": "rte"}})
    assert (config.lora.r, config.lora.alpha, config.rounds) == (4, 8, 250)
    assert (config.local.optimizer, config.local.steps, config.local.batch_size) == ("sgd", 20, 128)
    assert (config.clients.count, config.clients.alpha) == (10, 0.5)
    assert (config.lora.dropout, config.local.head) == (0.05, True)
    config = load({"task": {"name": "gsm8k"}})
    assert (config.lora.r, config.clients.count, config.local.steps) == (8, 6, 30)
    assert (config.lora.alpha, config.lora.dropout) == (16, 0.05)
    assert (config.local.optimizer, config.local.lr, config.local.batch_size) == ("sgd", 0.005, 1)
    assert (config.task.dtype, config.clients.partition) == ("bfloat16", "iid")
    assert load({"task": {"name": "codesearchnet"}}).clients.column == "language"
    for name in TASKS:
        assert load({"task": {"name": name}}).tree()["task"]["name"] == name


def test_gsm8k(tmp_path, llama, monkeypatch):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i},000"} for i in range(8)]
    write(tmp_path / "gsm8k" / "main" / "train-00000-of-00001.parquet", rows)
    write(tmp_path / "gsm8k" / "main" / "test-00000-of-00001.parquet", rows[:4])
    write(tmp_path / "gsm8k" / "socratic" / "test-00000-of-00001.parquet", rows)
    config = config_of(
        "gsm8k",
        model=str(llama),
        data=str(tmp_path / "gsm8k"),
        max_length=80,
        max_new_tokens=6,
        dtype="float32",
    )
    data = config.task.prepare(0)
    ids, labels = data.test["input_ids"][1], data.test["labels"][1]
    decode = tokenizer_of(llama).decode
    assert decode(ids[labels == IGNORE], skip_special_tokens=True).startswith(
        "Question: What is 1?\nAnswer:"
    )
    assert decode(labels[labels != IGNORE]) == " It is 1.\n#### 1,000</s>"
    summary = federate(config, tmp_path / "run")
    assert summary["accuracy"] == 0 and summary["loss"] < summary["start"]["loss"]
    # A model that answers as the second reference does.
    written = ["no number", "so 1000.00", "####2", "3,000 #### 4"]
    monkeypatch.setattr("fedrot.tasks.generation.generate", lambda *a: written)
    model = config.task.load_model(data)
    assert config.task.evaluate(model, data.test)["accuracy"] == 0.25


def test_a_tokenizer_that_closes_every_text():
    """The end is after the answer, and not after the prompt already."""

    class Closing:
        eos_token_id, pad_token_id = 9, 0

        def __call__(self, texts, add_special_tokens=True):
            end = [9] if add_special_tokens else []
            return {"input_ids": [[*map(int, text), *end] for text in texts]}

    batch, kept = generation(Closing(), ["12", "1"], ["3", "45"], 8)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 4, 5, 9]] and kept.tolist() == [0, 1]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 3, 9], [IGNORE, 4, 5, 9]]


def test_no_more_is_written_than_positions(tmp_path, gpt2, llama):
    rows = [{"question": "?", "answer": "#### 1"}, {"question": "??", "answer": "#### 2"}]
    for part in ("train", "test"):
        write(tmp_path / f"{part}.jsonl", rows)
    prompt = len("Question: ??\nAnswer:")
    options = {"data": str(tmp_path), "dtype": "float32"}

    def written(folder, most):
        task = config_of("gsm8k", model=str(folder), max_new_tokens=most, **options).task
        data = task.prepare(0)
        return task.evaluate(task.load_model(data), data.test)

    most = 64 - prompt
    assert written(gpt2, most)["loss"] > 0
    wanted = rf"max_new_tokens={most + 1}: the longest prompt has {prompt} tokens.* more than 64, "
    with pytest.raises(FedrotError, match=wanted):
        written(gpt2, most + 1)
    assert written(llama, most + 1)["loss"] > 0  # it knows no end


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 6 = 11\n#### 11", 11),
        ("#### 1,234", 1234),
        ("#### -3\nQuestion: 7", -3),
        ("in all 2.50.", 2.5),
        ("12.", 12),
        ("7 ####", 7),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def test_codesearchnet_and_humaneval(tmp_path, llama, monkeypatch):
    rows = [
        {
            "func_documentation_string": f"Returns {i}.",
            "func_code_string": f"def f():\n    return {i}",
            "language": ("go", "python")[i % 2],
        }
        for i in range(8)
    ]
    for part in ("train", "test"):
        write(tmp_path / "data" / part / "0.parquet", rows)
    write(tmp_path / "he" / "openai_humaneval" / "test-00000-of-00001.parquet", [PROBLEM] * 3)
    options = {"model": str(llama), "data": str(tmp_path / "data"), "dtype": "float32"}
    options |= {"max_length": 128, "max_new_tokens": 4, "humaneval": str(tmp_path / "he")}
    summary = federate(config_of("codesearchnet", **options), tmp_path / "run")
    assert summary["accuracy_is"] == "exact match" and summary["client_examples"] == [4, 4]

    def refuse(*args):
        raise AssertionError("a program was run")

    task = config_of("codesearchnet", **options, execute=True).task
    data = task.prepare(0)
    assert data.facts["accuracy_is"] == "HumanEval pass@1"
    model = task.load_model(data)
    right, wrong = "    return a + b\n\nprint(undefined)", "    return a - b"
    monkeypatch.setattr(
        "fedrot.tasks.generation.generate", lambda *a: [right, wrong, "    while True: pass"]
    )
    fast = config_of("codesearchnet", **options, execute=True, timeout=1.0).task
    assert fast.evaluate(model, data.test)["accuracy"] == pytest.approx(1 / 3)
    monkeypatch.setattr("fedrot.tasks.generation.passes", refuse)
    own = config_of("codesearchnet", **options).task
    assert "accuracy" in own.evaluate(model, own.prepare(0).test)


def test_programs_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert passes("import os\nassert 'SECRET' not in os.environ and not os.listdir('..') == []", 9)
    assert not passes("raise SystemExit(1)", 9)
    assert not passes("x = bytearray(8 << 30)", 9)
    mark = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    run = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert not passes(run, 0.5)
    monkeypatch.undo()
    import time

    time.sleep(2.2)
    assert not mark.exists()  # what the program started ended with it
    assert program(PROBLEM, "    return 1\ndef other(): pass").count("other") == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_model_in_half_precision(tmp_path, llama, dtype):
    """The factors stay in float32."""
    write(tmp_path / "own.jsonl", [{"prompt": str(i), "answer": "b"} for i in range(12)])
    data = str(tmp_path / "own.jsonl")
    config = config_of("text", model=str(llama), data=data, dtype=dtype)
    federation = prepare(config)
    kinds = {p.dtype for n, p in federation.model.named_parameters() if "lora_" not in n}
    assert kinds == {getattr(torch, dtype)}
    factors = draw_factors(federation.model, generator(0, "start", 0))
    assert {t.dtype for t in factors.A.values()} == {torch.float32}
    summary = federate(config, tmp_path / "run")
    assert summary["loss"] < summary["start"]["loss"] - 0.02


def test_a_head_on_a_half_precision_model_trains_in_float32(tmp_path, roberta):
    """Steps far below bfloat16's resolution are kept, and the factors follow PEFT's own."""
    rows = [{"text": f"{i} {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(16)]
    write(tmp_path / "own.jsonl", rows)
    local = {"local": {"optimizer": "sgd", "lr": 1e-4, "steps": 1, "head": True}}
    options = {"model": str(roberta), "data": str(tmp_path / "own.jsonl"), "dtype": "bfloat16"}
    federation = prepare(config_of("text", local, **options))
    start = federation.start()
    assert federation.model.get_base_model().classifier.dense.weight.dtype == torch.bfloat16
    uploads = train_round(federation, start).clients
    for name, value in start.head.items():
        moved = uploads[0].head[name] - value
        assert value.dtype == moved.dtype == torch.float32
        assert 0 < float(moved.abs().max()) < 1e-3
    name = "classifier.out_proj.weight"
    step = (uploads[0].head[name] - start.head[name]) / -1e-4
    assert (
        float((uploads[0].head[name].bfloat16() != start.head[name].bfloat16()).float().mean())
        < 0.5
    )
    set_factors(federation.model, start.factors)
    batch_rows = draw_batches(
        federation.examples[0], federation.config.local, generator(0, "batches", 0, 0)
    )[0]
    batch = trim({key: value[batch_rows] for key, value in federation.data.train.items()})
    weight = federation.model.get_base_model().classifier.out_proj.weight
    weight.requires_grad_()
    federation.model(**batch).loss.backward()
    expected = weight.grad.float()
    assert float((step - expected).norm()) < 0.02 * float(expected.norm())


def test_sequences_of_clients_together_and_one_at_a_time(tmp_path, llama):
    """One padded pass for clients whose sequences differ in length is each one's own training."""
    rows = [
        {"prompt": f"{i} ->", "answer": "xyz" * (1 + 4 * (i % 2)), "user": i % 2} for i in range(12)
    ]
    write(tmp_path / "train.jsonl", rows)
    options = {"model": str(llama), "data": str(tmp_path), "max_length": 32}
    by_user = {"clients": {"partition": "column", "column": "user"}}
    results = []
    for together in (None, 1):
        local = {"local": {"together": together}}
        federation = prepare(config_of("text", by_user, local, **options))
        results.append(train_round(federation, federation.start()))
    both, alone = results
    start = federation.start().factors
    assert both.train_loss == pytest.approx(alone.train_loss, rel=1e-5)
    for a, b in zip(both.factors, alone.factors, strict=True):
        for name in a.B:
            assert float((a.B[name] - start.B[name]).norm()) > 1e-2
            torch.testing.assert_close(a.B[name], b.B[name], rtol=0, atol=1e-4)
