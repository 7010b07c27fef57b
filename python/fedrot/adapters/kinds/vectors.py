"""Adapters that train vectors: (IA)³ and VeRA; and whole parameters."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from fedrot.adapters.config import Config
from fedrot.adapters.kinds.base import Kind, Plain, Tensors
from fedrot.adapters.layers import StateKeys
from fedrot.errors import FedrotError
from fedrot.methods import FedRot


class IA3(Plain):
    """(IA)³ (arXiv 2205.05638): ``W diag(l)`` or ``diag(l) W``.

    Linear in ``l``, with no other ``l`` for the same weight: the mean vector gives the mean weight.
    """

    peft_type = "IA3"
    title = "(IA)3"
    keys = re.compile(r".+\.ia3_l")
    neutral = frozenset({"init_ia3_weights"})
    must_agree: ClassVar[dict[str, Any]] = {"feedforward_modules": None, "fan_in_fan_out": False}


class Vera(Kind):
    """VeRA (arXiv 2310.11454): ``dW = diag(b) B diag(d) A``, with ``A``, ``B`` frozen and shared.

    ``(c b, d / c)`` is the same update for any ``c != 0``. As of LoRA's invertible matrices only
    the orthogonal ones are used, so here only ``c = -1``: small steps of gradient descent
    keep the scale (``|b|² - |d|²`` stays), and fitting it would hold ``b`` back, which starts at
    zero.
    """

    peft_type = "VERA"
    title = "VeRA"
    keys = re.compile(r"(.+)\.vera_lambda_[bd]")
    shared = re.compile(r"(.+\.)?vera_[AB]")
    neutral = frozenset({"r", "vera_dropout", "d_initial", "init_weights"})
    must_agree: ClassVar[dict[str, Any]] = {
        "projection_prng_key": 0,
        "save_projection": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }

    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        out = dict(tensors)
        layers = sorted({key.rpartition(".")[0] for key in tensors})
        for layer in layers:
            names = [f"{layer}.vera_lambda_{vector}" for vector in "bd"]
            # |c b - b_ref|² + |c d - d_ref|² is least for the sign of this.
            if sum(float((tensors[n].double() * reference[n].double()).sum()) for n in names) < 0:
                out.update({name: -tensors[name] for name in names})
        return out, ""


class Full(Plain):
    """Whole parameters of one base model: ``mean(W_0 + D_i) = W_0 + mean(D_i)``, nothing to align.

    Not a type of PEFT's: it has no configuration, and its folders are those of transformers.
    """

    peft_type = "whole parameters"
    title = "whole parameters"
    keys = re.compile(r".+")

    _adapter = re.compile(
        r"(^|\.)(lora_|hada_|lokr_|ia3_l|vera_|oft_|boft_|prompt_|base_layer\.|modules_to_save\.)"
    )

    def sort(self, tensors: Tensors, config: Config, source: str) -> StateKeys:
        for key in tensors:
            if self._adapter.search(key):
                raise FedrotError(
                    f"{source}: {key!r} belongs to an adapter, which a plain average may destroy; "
                    "give its configuration in the place of None"
                )
        return super().sort(tensors, config, source)
