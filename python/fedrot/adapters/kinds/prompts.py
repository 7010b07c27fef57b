"""Virtual tokens: prompt tuning and prefix tuning."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedrot.adapters.config import Config
from fedrot.adapters.kinds.base import Kind, Tensors
from fedrot.errors import FedrotError
from fedrot.methods import FedRot

KEY = "prompt_embeddings"


class PromptTuning(Kind):
    """Prompt tuning (arXiv 2104.08691): embeddings of virtual tokens, ``(s n, d)``.

    ``s`` is the number of stacks that have a prompt (an encoder and a decoder: 2). Tokens are
    assigned to the reference's as in arXiv 2502.19752's and other matchings of prompts. No
    invariance: a model that knows positions is another function after it.
    """

    peft_type = "PROMPT_TUNING"
    title = "prompt tuning"
    keys = re.compile(KEY)
    neutral = frozenset(
        {
            *("num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text"),
            *("tokenizer_name_or_path", "tokenizer_kwargs"),
        }
    )
    must_agree: ClassVar[dict[str, Any]] = {
        "num_virtual_tokens": None,
        "token_dim": None,
        "num_transformer_submodules": None,
    }

    def check_shapes(self, tensors: Tensors, config: Config, source: str) -> None:
        rows = _number(config, "num_virtual_tokens", source) * _stacks(config)
        _check(tensors[KEY], (rows, _number(config, "token_dim", source)), source)

    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        ours, theirs = (t[KEY].unflatten(0, (_stacks(config), -1)) for t in (tensors, reference))
        order = assignment(ours, theirs)
        out = ours.take_along_dim(order[..., None], 1).flatten(0, 1)
        moved = int((order != torch.arange(order.shape[-1])).sum())
        note = (
            f"{moved} of {order.numel()} virtual tokens changed places; where the model knows "
            "positions that is another prompt, and lam 0 leaves them in place"
        )
        return {KEY: out}, note if moved else ""


class PrefixTuning(Kind):
    """Prefix tuning (arXiv 2101.00190): a key and a value per virtual token, layer and head.

    PEFT stores ``(n, 2 L H h)``: of each token, for each layer the keys of all heads, then the
    values. Attention sums over the tokens, ``softmax(q K^T) V``, and PEFT gives the keys no
    position, so in every layer and head the tokens may stand in any order; not so where the model
    adds something for the places of keys to ``q K^T``, as T5 does.
    """

    peft_type = "PREFIX_TUNING"
    title = "prefix tuning"
    keys = re.compile(KEY)
    neutral = frozenset({"init_weights", "encoder_hidden_size"})
    must_agree: ClassVar[dict[str, Any]] = {
        "num_virtual_tokens": None,
        "token_dim": None,
        "num_transformer_submodules": None,
        "num_attention_heads": None,
        "num_layers": None,
        "prefix_projection": False,
    }

    def check_config(self, config: Config, source: str) -> None:
        super().check_config(config, source)
        if config.get("prefix_projection"):
            raise FedrotError(
                f"{source}: prefix_projection is set: PEFT saves the prefix that the projection "
                "makes and not its weights, so what is merged could not be trained further; train "
                "without it"
            )

    def check_shapes(self, tensors: Tensors, config: Config, source: str) -> None:
        width = _number(config, "token_dim", source)
        heads = _number(config, "num_attention_heads", source)
        if width % heads:
            raise FedrotError(f"{source}: token_dim {width} is no multiple of {heads} heads")
        rows = _number(config, "num_virtual_tokens", source)
        columns = 2 * _number(config, "num_layers", source) * width
        _check(tensors[KEY], (rows, columns), source)

    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        shape = (config["num_layers"], 2, config["num_attention_heads"], -1)
        ours, theirs = (
            t[KEY].unflatten(1, shape).permute(1, 3, 0, 2, 4) for t in (tensors, reference)
        )  # layer, head, token, key or value, its entries
        order = assignment(ours.flatten(3), theirs.flatten(3))
        out = ours.take_along_dim(order[..., None, None], 2)
        moved = (order != torch.arange(order.shape[-1])).any(-1)
        note = (
            f"virtual tokens were put in another order in {int(moved.sum())} of {moved.numel()} "
            "heads: the same function, unless attention looks at the places of keys (T5's "
            "relative positions, ALiBi, sliding windows); lam 0 leaves them in place"
        )
        return {KEY: out.permute(2, 0, 3, 1, 4).flatten(1)}, note if moved.any() else ""


def assignment(ours: Tensor, theirs: Tensor) -> Tensor:
    """Which of our tokens goes to each place of theirs, so that the squared distance is least.

    Args:
        ours, theirs: ``(..., n, f)``, ``n`` tokens of ``f`` entries.

    Returns:
        ``(..., n)``, int64, permutations of ``0 .. n - 1``; the identity where none is better.
    """
    # |x - y|² summed over pairs is least where <x, y> is largest: norms are the same in any order.
    scores = theirs.double() @ ours.double().mT
    identity = torch.arange(scores.shape[-1])
    orders = []
    for score in scores.flatten(0, -3):
        best = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
        gain = score[identity, best].sum() - score.trace()
        orders.append(best if gain > 1e-12 * score.abs().sum() else identity)
    return torch.stack(orders).view(scores.shape[:-1])


def _number(config: Config, field: str, source: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FedrotError(f"{source}: {field} must be a positive integer, got {value!r}")
    return value


def _stacks(config: Config) -> int:
    return config.get("num_transformer_submodules") or 1


def _check(tensor: Tensor, shape: tuple[int, int], source: str) -> None:
    if tuple(tensor.shape) != shape:
        raise FedrotError(
            f"{source}: {KEY!r} has shape {tuple(tensor.shape)}, the configuration gives it {shape}"
        )
