"""The interface between a task and the simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

# Keyword arguments of the model's forward, labels included; the first dimension counts examples.
# The forward returns an output with `.loss`, the mean over the batch (transformers' convention).
Batch = dict[str, Tensor]

# Wraps the iterations of a long loop to show them: `for x in track(range(n), "label")`.
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A :data:`Track` that shows nothing."""
    return items


@dataclass(frozen=True)
class TaskData:
    """What a federation trains and is tested on.

    ``base`` is a transformers folder with the model to adapt, head included; ``labels``
    ``(n_train,)`` is what the Dirichlet partition splits by; ``facts`` go into the summary.
    """

    base: Path
    train: Batch
    test: Batch
    labels: Tensor
    facts: dict[str, Any]


class Task(Protocol):
    """A frozen dataclass; its fields are the options under ``task:``."""

    title: ClassVar[str]

    def prepare(self, seed: int, track: Track = no_progress) -> TaskData:
        """Data and base model of a run; makes and caches the base model where it is missing."""
        ...

    def load_model(self, base: Path) -> nn.Module:
        """The frozen base model, on the CPU, in evaluation mode."""
        ...

    def lora_targets(self, model: nn.Module) -> list[str]:
        """The last parts of the names of the linear layers that LoRA adapts."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """``accuracy`` (fraction) and ``loss`` (mean) on a held-out batch."""
        ...
