"""The interface between a task and the simulation, and the losses that tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedrot.errors import FedrotError
from fedrot.progress import Track, no_progress

# Keyword arguments of the model's forward, labels included; the first dimension counts examples.
# Labels are (n,) classes, or (n, T) tokens with IGNORE where nothing is to be predicted.
# Sequences (n, T) are padded on the right, and `attention_mask` (n, T) says where they end.
Batch = dict[str, Tensor]

IGNORE = -100  # transformers' label of a token that is not predicted


@dataclass(frozen=True)
class TaskData:
    """What a federation trains and is tested on.

    ``base`` is a transformers folder with the model to adapt; where it lacks a head, one for
    ``classes`` classes is drawn from ``seed``. ``labels`` ``(n_train,)`` are integers that the
    ``dirichlet`` and ``labels`` partitions split by, ``columns`` (name -> ``(n_train,)``
    integers) what the ``column`` partition may. ``facts`` go into the summary. ``test`` may hold
    tensors more than the model takes, for ``evaluate``.
    """

    base: Path
    train: Batch
    test: Batch
    labels: Tensor
    facts: dict[str, Any]
    columns: dict[str, Tensor] = field(default_factory=dict)
    classes: int = 0
    seed: int = 0


class Task(Protocol):
    """A frozen dataclass; its fields are the options under ``task:``.

    ``preset``: the configuration that the task is meant for, weaker than the named setting.
    """

    title: ClassVar[str]
    preset: ClassVar[dict[str, Any]]

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        """Data and base model of a run; makes and caches the base model where it is missing.

        ``clients_by``: the column that clients are made of. Where the task itself holds out its
        test part, every value of this column keeps a training example.
        """
        ...

    def load_model(self, data: TaskData) -> nn.Module:
        """The frozen base model, on the CPU, in evaluation mode."""
        ...

    def lora_targets(self, model: nn.Module) -> list[str]:
        """The last parts of the names of the linear layers that LoRA adapts."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """``accuracy`` (fraction) and ``loss`` (mean) on held-out examples."""
        ...


def example_terms(labels: Tensor) -> Tensor:
    """Of how many terms the loss of every example is the sum, ``(b,)``; ``labels`` as for
    :func:`example_losses`."""
    return torch.ones_like(labels) if labels.dim() == 1 else (labels[:, 1:] != IGNORE).sum(1)


def example_losses(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of every example: the sum of its terms ``(b,)`` and their number ``(b,)``.

    The sum over any group of examples of the first, divided by that of the second, is the group's
    mean loss, whatever the lengths of the sequences.

    Args:
        output: of the model's forward, with ``logits`` ``(b, classes)`` or ``(b, T, vocabulary)``.
        batch: ``labels`` ``(b,)``, one term an example; or ``(b, T)``, where the logits at ``t``
            predict the label at ``t + 1`` and a label of -100 is no term.
    """
    logits, labels = output.logits, batch["labels"]
    if labels.dim() == 1:
        return cross_entropy(logits.float(), labels, reduction="none"), example_terms(labels)
    wanted = labels[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        wanted.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return losses.view_as(wanted).sum(1), example_terms(labels)


def example_hits(output: Any, batch: Batch) -> Tensor:
    """Whether every example is right ``(b,)``: its class; or each of its labelled tokens.

    The latter is exact match by greedy generation: that writes the labelled tokens if and only if
    each of them is the likeliest one after those before it.
    """
    best, labels = output.logits.argmax(-1), batch["labels"]
    if labels.dim() == 1:
        return best == labels
    wanted = labels[:, 1:]
    return ((best[:, :-1] == wanted) | (wanted == IGNORE)).all(1)


def trim(batch: Batch) -> Batch:
    """The batch without the columns in which every sequence is padding."""
    if "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"]
    length = int(mask.sum(1).max())
    return {
        key: value[:, :length] if value.shape[:2] == mask.shape else value
        for key, value in batch.items()
    }


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in trimmed parts of ``size`` examples."""
    for start in range(0, len(batch["labels"]), size):
        yield trim({key: value[start : start + size] for key, value in batch.items()})


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, size: int) -> dict[str, float]:
    """``accuracy`` and ``loss``, ``size`` examples at a time, where the model is."""
    device = next(model.parameters()).device
    hits = total = terms = 0.0
    for piece in pieces(batch, size):
        part = {key: value.to(device) for key, value in piece.items()}
        output = model(**{key: value for key, value in part.items() if key != "labels"})
        sums, counts = example_losses(output, part)
        hits += float(example_hits(output, part).sum())
        total += float(sums.double().sum())
        terms += float(counts.sum())
    return {"accuracy": hits / len(batch["labels"]), "loss": total / max(terms, 1.0)}


# By architecture: BERT and ViT, Llama and CLIP, DeBERTa, DistilBERT, GPT-2.
QUERY_VALUE = {
    *("query", "value", "q_proj", "v_proj", "query_proj", "value_proj", "q_lin", "v_lin"),
    "c_attn",
}


def query_and_value(model: nn.Module) -> list[str]:
    """The names of the query and value projections, LoRA's customary targets."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = sorted(ends.intersection(QUERY_VALUE))
    if not found:
        raise FedrotError(f"{type(model).__name__} has no query and value layer that is known here")
    return found
