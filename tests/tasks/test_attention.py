"""Attention of the embedded tasks beside transformers' plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from fedrot.tasks import digits, strings
from fedrot.tasks.attention import attend, short_attention


def models(kind: Any, config: Any, architecture: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The same random model with plain attention and with ours."""
    torch.manual_seed(0)
    plain, ours = (
        kind(config(**{**architecture, "attn_implementation": name}))
        for name in ("eager", short_attention())
    )
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("task", ["digits", "strings"])
def test_outputs_and_gradients_are_those_of_plain_attention(task: str) -> None:
    if task == "digits":
        plain, ours = models(ViTForImageClassification, ViTConfig, digits.ARCHITECTURE)
        batch = {"pixel_values": torch.rand(3, 1, 8, 8)}
    else:
        plain, ours = models(LlamaForCausalLM, LlamaConfig, strings.ARCHITECTURE)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 7:] = 0  # padded behind, and
        mask[2, :4] = 0  # before
        batch = {"input_ids": torch.randint(20, (3, 12)), "attention_mask": mask}
    found = {}
    for name, model in (("plain", plain), ("ours", ours)):
        logits = model(**batch).logits
        if task == "strings":
            logits = logits[mask.bool()]
        logits.square().sum().backward()
        found[name] = [logits.detach(), *(p.grad for p in model.parameters())]
    assert len(found["plain"]) > 20
    torch.testing.assert_close(found["ours"], found["plain"], rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    _, ours = models(LlamaForCausalLM, LlamaConfig, strings.ARCHITECTURE)
    one, other = torch.randint(20, (2, 1, 12))
    other[0, :6] = one[0, :6]
    a, b = ours(input_ids=one).logits[0], ours(input_ids=other).logits[0]
    torch.testing.assert_close(a[:6], b[:6], rtol=1e-5, atol=1e-6)
    assert (a[6:] - b[6:]).abs().max() > 1e-3


def test_dropout_of_weights() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 5, 2, 9, 4)
    value = torch.eye(9).expand(5, 2, 9, 9)  # the output is the weights
    layer = nn.Module()
    weights = attend(layer.eval(), query, key, value, None, dropout=0.5)[0].transpose(1, 2)
    torch.testing.assert_close(weights, (query @ key.mT / 2).softmax(-1))
    dropped = attend(layer.train(), query, key, value, None, dropout=0.5)[0].transpose(1, 2)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])
