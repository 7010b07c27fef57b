"""Losses and hits per example, against transformers' own loss and greedy generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedrot.tasks.base import (
    IGNORE,
    evaluate,
    example_hits,
    example_losses,
    pieces,
    query_and_value,
    trim,
)
from fedrot.tasks.cache import quiet
from fedrot.tasks.encode import classification, generate, generation, prompts_of, tokenizer_of

TEXTS = ["a", "much longer than the others", "two words"]


@pytest.fixture(scope="module")
def causal(llama):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(llama).eval()


def test_any_group_of_sequences_has_transformers_mean(causal, llama):
    batch, _ = generation(tokenizer_of(llama), TEXTS, ["xyz", "y", "a long answer"], 64)
    with torch.no_grad():
        sums, counts = example_losses(causal(**batch), batch)
        for group in ([0], [1, 2], [0, 1, 2]):
            part = {key: value[group] for key, value in batch.items()}
            mean = sums[group].sum() / counts[group].sum()
            assert float(mean) == pytest.approx(float(causal(**part).loss), rel=1e-5)
    assert counts.tolist() == [4, 2, 14]  # the answer's bytes and the end


def test_classification_losses_are_transformers_own(roberta):
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=3).eval()
    batch = classification(tokenizer_of(roberta), [TEXTS], 64)
    batch["labels"] = torch.tensor([0, 2, 1])
    with torch.no_grad():
        output = model(**batch)
    sums, counts = example_losses(output, batch)
    assert float(sums.mean()) == pytest.approx(float(output.loss), rel=1e-6)
    assert counts.tolist() == [1, 1, 1]
    hits = output.logits.argmax(1) == batch["labels"]
    assert torch.equal(example_hits(output, batch), hits)
    # Padding changes nothing, nor does the size of the pieces.
    scores = [evaluate(model, batch, size) for size in (1, 2, 3)]
    assert all(s["accuracy"] == pytest.approx(float(hits.float().mean())) for s in scores)
    assert all(s["loss"] == pytest.approx(float(output.loss), rel=1e-4) for s in scores)


def test_hits_by_hand():
    logits = torch.zeros(2, 4, 3)
    logits[:, 1, 2] = logits[:, 2, 1] = 1.0  # both write 2, 1
    labels = torch.tensor([[IGNORE, IGNORE, 2, 1], [IGNORE, IGNORE, 2, 2]])
    found = example_hits(SimpleNamespace(logits=logits), {"labels": labels})
    assert found.tolist() == [True, False]


def test_teacher_forced_hits_are_greedy_exact_match(causal, llama):
    """Answers that the model does and does not write itself."""
    tokenizer = tokenizer_of(llama)
    batch, _ = generation(tokenizer, TEXTS, ["???"] * 3, 64)
    prompts = prompts_of(batch)
    assert tokenizer.batch_decode([p[1:].tolist() for p in prompts]) == TEXTS
    new, rows = 5, []
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = causal.generate(
                input_ids=prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=1,
            )[0]
        if index == 1:
            whole[-1] = (whole[-1] + 1) % 300
        labels = whole.clone()
        labels[: len(prompt)] = IGNORE
        rows.append((whole, labels))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in rows], True, 0)
    made = {
        "input_ids": ids,
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], True, 0),
        "labels": pad([labels for _, labels in rows], True, IGNORE),
    }
    with torch.no_grad():
        assert example_hits(causal(**made), made).tolist() == [True, False, True]
    assert evaluate(causal, made, size=2)["accuracy"] == pytest.approx(2 / 3)


def test_generation_in_a_padded_batch_is_that_of_one_prompt(causal, llama):
    tokenizer = tokenizer_of(llama)
    prompts = prompts_of(generation(tokenizer, TEXTS, ["x"] * 3, 64)[0])
    together = generate(causal, tokenizer, prompts, 8, size=3)
    alone = [generate(causal, tokenizer, [prompt], 8, size=1)[0] for prompt in prompts]
    assert together == alone and len(set(alone)) > 1


def test_trim_drops_common_padding_only():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": mask}
    batch["labels"] = torch.tensor([0, 1])
    assert trim(batch)["input_ids"].tolist() == [[0, 1], [4, 5]]
    assert trim(batch)["labels"].tolist() == [0, 1]
    assert [p["input_ids"].shape[1] for p in pieces(batch, 1)] == [2, 1]
    images = {"pixel_values": torch.zeros(2, 3), "labels": batch["labels"]}
    assert trim(images) is images


def test_what_generation_leaves_out(llama):
    tokenizer = tokenizer_of(llama)
    batch, kept = generation(tokenizer, ["123456789", "12"], ["abc", "abcdef"], 8)
    assert kept.tolist() == [1]
    assert batch["input_ids"].shape == (1, 8)  # <s> 1 2 a b c d e: cut, without an end
    assert (batch["labels"] != IGNORE).tolist() == [[False] * 3 + [True] * 5]


def test_targets(causal, roberta):
    assert query_and_value(causal) == ["q_proj", "v_proj"]
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(roberta)
    assert query_and_value(model) == ["query", "value"]
