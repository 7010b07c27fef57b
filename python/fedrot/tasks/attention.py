"""Attention over fewer tokens than a vector register holds numbers, as the embedded tasks have.

PyTorch's softmax over a last dimension shorter than a vector (16 float32 with AVX-512) goes number
by number, and over any other dimension it takes whole vectors: for nine keys a sixth of the time,
though scores are turned round before and after (docs/training.md).
"""

from __future__ import annotations

from typing import Any

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
    scores = (query * scaling) @ key.mT
    if attention_mask is not None:
        scores = scores + attention_mask
    keys_first = scores.reshape(-1, scores.shape[-1]).T.contiguous()
    weights = keys_first.softmax(0).T.reshape(scores.shape)
    weights = drop(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
