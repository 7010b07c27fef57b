"""From text to batches: classification (text, class) and generation (prompt, answer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrot.errors import FedrotError, first_line
from fedrot.tasks.base import IGNORE, Batch


@lru_cache(maxsize=4)
def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FedrotError(f"{folder} holds no tokenizer ({first_line(error)})") from error


def classification(tokenizer: Any, texts: Sequence[Sequence[str]], longest: int) -> Batch:
    """Examples of one or two texts each, the tokens cut to ``longest``; without labels."""
    encoded = tokenizer(*map(list, texts), truncation=True, max_length=longest)
    pad = _pad_id(tokenizer)
    # GPT-2 makes no token of an empty text, but a model needs one.
    return _padded([torch.tensor(ids or [pad]) for ids in encoded["input_ids"]], pad)


def generation(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], longest: int
) -> tuple[Batch, Tensor]:
    """Prompt, answer and end of text as one sequence; the labels are those of the latter two.

    A longer sequence is cut to ``longest`` tokens. Examples whose prompt alone fills that are left
    out; the second value ``(kept,)`` says which examples are in the batch.
    """
    if not prompts:
        return {}, torch.zeros(0, dtype=torch.long)
    starts = tokenizer(list(prompts))["input_ids"]
    ends = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    rows, labels, kept = [], [], []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        start = _without_end(start, tokenizer)
        if len(start) < longest:
            whole = torch.tensor([*start, *end, tokenizer.eos_token_id][:longest])
            rows.append(whole)
            labels.append(torch.cat([torch.full((len(start),), IGNORE), whole[len(start) :]]))
            kept.append(index)
    if not rows:
        raise FedrotError(f"task.max_length={longest} is too short for every prompt")
    batch = _padded(rows, _pad_id(tokenizer))
    batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, True, IGNORE)
    return batch, torch.tensor(kept)


def codes(values: Iterable[Any]) -> tuple[Tensor, list[Any]]:
    """Values as integers ``(n,)``, and the sorted distinct values that these count."""
    values = list(values)
    names = sorted(set(values), key=lambda value: (str(type(value)), value))
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[value] for value in values], dtype=torch.long), names


def prompts_of(batch: Batch) -> list[Tensor]:
    """The tokens before the first label of every example."""
    return [
        ids[: int((labels != IGNORE).int().argmax())]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Tensor], new_tokens: int, size: int
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the end of text."""
    device, written = next(model.parameters()).device, []
    for first in range(0, len(prompts), size):
        # Padded on the left: all go on from the last column.
        rows = [prompt.flip(0) for prompt in prompts[first : first + size]]
        left = {key: value.flip(1).to(device) for key, value in _padded(rows, 0).items()}
        out = model.generate(
            **left,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_pad_id(tokenizer),
        )
        new = out[:, left["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new.tolist(), skip_special_tokens=True)
    return written


def _padded(rows: Sequence[Tensor], pad: int) -> Batch:
    sequence = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": sequence(list(rows), True, pad),
        "attention_mask": sequence([torch.ones_like(row) for row in rows], True, 0),
    }


def _pad_id(tokenizer: Any) -> int:
    """Llama has no padding token; any does, as it is masked."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None), 0)


def _without_end(tokens: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text."""
    if tokenizer.eos_token_id is None:
        raise FedrotError("the tokenizer has no end-of-text token, which generation needs")
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens
