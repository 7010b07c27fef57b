"""Attention over fewer tokens than a vector register holds numbers, as the embedded tasks have.

PyTorch's softmax over a last dimension shorter than a vector (16 float32 with AVX-512) goes number
by number, and over any other dimension it takes whole vectors: for nine keys a sixth of the time
(docs/training.md). So positions come first here, of tokens as of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop


def short_attention() -> str:
    """The ``attn_implementation`` of transformers by which a model takes :func:`attend`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("fedrot_short", attend)
    AttentionMaskInterface.register("fedrot_short", eager_mask)
    return "fedrot_short"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers calls eager attention: ``query``, ``key``, ``value`` ``(b, heads, n, d)``,
    ``attention_mask`` added to the scores. Returns ``(b, n, heads, d)`` and the weights."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    b, heads = query.shape[:2]
    q, k, v = (_positions_first(t) for t in (query * scaling, key, value))
    scores = torch.bmm(k.transpose(0, 1), q.permute(1, 2, 0))  # (b * heads, keys, queries)
    if attention_mask is not None:
        by_head = scores.view(b, heads, *scores.shape[1:]) + attention_mask.mT
        scores = by_head.view(scores.shape)
    by_key = scores.transpose(0, 1).contiguous().softmax(0)
    weights = drop(by_key.permute(1, 2, 0), p=dropout, training=module.training)
    means = torch.bmm(weights, v.transpose(0, 1)).unflatten(0, (b, heads))
    return means.transpose(1, 2).contiguous(), weights.unflatten(0, (b, heads))


def _positions_first(x: Tensor) -> Tensor:
    """``(b, heads, n, d)`` to ``(n, b * heads, d)``, of which every head is a matrix as it lies."""
    return x.permute(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])
