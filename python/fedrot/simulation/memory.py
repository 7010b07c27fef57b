"""What the frozen layers before the first adapted one make of an example: the same in every step.

Their outputs are computed once for all training examples and looked up from then on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedrot.simulation.adapter import parameter_names
from fedrot.tasks import Batch

LARGEST = 64 << 20  # bytes that may be kept
FIRST, PIECE = 3, 256  # examples at a time; the first few tell how much there would be to keep


class Memory:
    """Outputs of frozen modules by name, ``(n_train, ...)``; ``rows`` ``(b,)`` says which examples
    the next pass of the model is about."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        self.outputs = outputs
        self.rows = torch.empty(0, dtype=torch.long)

    @contextmanager
    def recalled(self, model: PeftModel) -> Iterator[None]:
        """The model with these modules answering from memory."""
        modules = {name: model.get_base_model().get_submodule(name) for name in self.outputs}

        def answer(output: Tensor) -> Any:
            return lambda *args, **kwargs: output.index_select(0, self.rows)

        try:
            for name, module in modules.items():
                # Not exchanged: models look at the parameters of some of their modules.
                module.forward = answer(self.outputs[name])
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)


def remember(model: PeftModel, train: Batch) -> Memory:
    """The outermost modules whose outputs no trained parameter reaches, with these outputs.

    Nothing is kept of sequences, which are cut to the longest of their batch, nor more than
    ``LARGEST`` bytes.
    """
    n = len(train["labels"])
    if "attention_mask" in train:
        return Memory({})
    pieces: list[dict[str, Tensor]] = []
    cuts = [0, *range(min(FIRST, n), n, PIECE), n]
    for start, end in itertools.pairwise(cuts):
        piece = {key: value[start:end] for key, value in train.items() if key != "labels"}
        batch = {key: value.to(model.device) for key, value in piece.items()}
        pieces.append(_frozen_outputs(model, batch, end - start))
        if sum(output.nbytes for output in pieces[0].values()) * n > LARGEST * cuts[1]:
            return Memory({})
    everywhere = [name for name in pieces[0] if all(name in piece for piece in pieces)]
    return Memory({name: torch.cat([piece[name] for piece in pieces]) for name in everywhere})


def _frozen_outputs(model: PeftModel, batch: Batch, n: int) -> dict[str, Tensor]:
    """The outputs that hold a row an example and have no gradient, of modules called once."""
    base = model.get_base_model()
    calls: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda module, args, output: calls.setdefault(name, []).append(output)

    hooks = [module.register_forward_hook(watch(name)) for name, module in base.named_modules()]
    try:
        base(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {
        name: outputs[0]
        for name, outputs in calls.items()
        if len(outputs) == 1
        and isinstance(outputs[0], Tensor)
        and not outputs[0].requires_grad
        and outputs[0].shape[:1] == (n,)
    }
    inner = (*found, *parameter_names(model))  # the frozen layer under an adapter is not called
    return {
        name: output
        for name, output in found.items()
        if not any(name.startswith(f"{outer}.") for outer in inner)
    }
