"""LoHa: the elementwise product of two low-rank products."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fedrot.adapters.config import Config, alpha_of
from fedrot.adapters.kinds.base import Kind, Tensors
from fedrot.adapters.layers import module_of
from fedrot.errors import FedrotError
from fedrot.methods import FedRot


class LoHa(Kind):
    """LoHa (FedPara, arXiv 2108.06098): ``dW = s (w1_a w1_b) * (w2_a w2_b)``, elementwise.

    ``w_a`` is ``(d, r)``, ``w_b`` ``(r, k)``. Each of the two products has a basis of its own, as
    ``B A`` of LoRA; they may change places, and both their signs. All of that is aligned, places
    and signs only by the whole rotation, since there is no part of them to take. Rows (columns) of
    one product may also be scaled against those of the other: like LoRA's scalings, this is left
    as it is.
    """

    peft_type = "LOHA"
    title = "LoHa"
    keys = re.compile(r".+\.hada_(w[12]_[ab]|t[12])")
    neutral = frozenset(
        {
            *("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"),
            *("init_weights", "use_effective_conv2d"),
        }
    )
    rotates = True

    def check_shapes(self, tensors: Tensors, config: Config, source: str) -> None:
        for key, tensor in tensors.items():
            if re.search(r"\.hada_t[12]$", key):
                raise FedrotError(
                    f"{source}: {key!r}: use_effective_conv2d keeps a core tensor between the "
                    "factors, which this version of fedrot cannot rotate; train convolutions "
                    "without it"
                )
            if self.keys.fullmatch(key) and tensor.ndim != 2:
                raise FedrotError(f"{source}: {key!r} has shape {tuple(tensor.shape)}, not two")
        for layer in layers(tensors):
            for number in "12":
                names = [f"{layer}.hada_w{number}_{side}" for side in "ab"]
                if missing := [name for name in names if name not in tensors]:
                    raise FedrotError(f"{source}: layer {layer!r} has no {missing[0]!r}")
                w_a, w_b = (tensors[name] for name in names)
                if w_a.shape[1] != w_b.shape[0]:
                    raise FedrotError(
                        f"{source}: layer {layer!r} has {names[0]!r} of shape {tuple(w_a.shape)} "
                        f"and {names[1]!r} of shape {tuple(w_b.shape)}"
                    )

    def check_config(self, config: Config, source: str) -> None:
        super().check_config(config, source)
        for alpha in (config.get("alpha", 1), *(config.get("alpha_pattern") or {}).values()):
            if not alpha > 0:  # adapters are compared by the root of the ratio
                raise FedrotError(f"{source}: alpha must be above 0 for {self.title}, got {alpha}")

    def scale(self, config: Config, reference: Config, key: str) -> float:
        # Four factors share the scaling, alpha / r; the ranks are the same.
        target = module_of(key.rpartition(".")[0])
        ours, theirs = (alpha_of(c, target, "alpha") for c in (config, reference))
        return (ours / theirs) ** 0.25

    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        # w_a stands in the place of LoRA's B, w_b in that of A.
        names, A, B = [], [], []
        for layer in layers(tensors):
            pairs, theirs = (_pairs(t, layer) for t in (tensors, reference))
            names += [f"{layer}.hada_w{number}" for number in "12"]
            for w_a, w_b in _in_place(pairs, theirs) if method.lam == 1 else pairs:
                A.append(w_b)
                B.append(w_a)
        ref_A, ref_B = ([reference[f"{name}_{side}"] for name in names] for side in "ba")
        options = {"lam": method.lam, "align": method.align, "proper": method.proper}
        rotations = torch.ops.fedrot.align(A, B, ref_A, ref_B, **options)
        out = {}
        for name, R, w_b, w_a in zip(names, rotations, A, B, strict=True):
            out[f"{name}_a"], out[f"{name}_b"] = w_a @ R, R.mT @ w_b
        return out, ""


def layers(tensors: Tensors) -> list[str]:
    """The layers that have factors, sorted by name."""
    return sorted({key.rpartition(".")[0] for key in tensors if ".hada_w" in key})


def _pairs(tensors: Tensors, layer: str) -> list[tuple[Tensor, Tensor]]:
    first, second = (
        (tensors[f"{layer}.hada_w{number}_a"], tensors[f"{layer}.hada_w{number}_b"])
        for number in "12"
    )
    return [first, second]


def _in_place(
    pairs: list[tuple[Tensor, Tensor]], reference: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """The two pairs in the order, and of the common sign, in which their products are nearest to
    the reference's: ``sum |P - Q|²`` is least where ``sum <P, Q>`` is largest."""
    straight = sum(_inner(p, q) for p, q in zip(pairs, reference, strict=True))
    swapped = sum(_inner(p, q) for p, q in zip(pairs[::-1], reference, strict=True))
    score = straight
    if abs(swapped) > abs(straight):
        pairs, score = pairs[::-1], swapped
    return [(-w_a, w_b) for w_a, w_b in pairs] if score < 0 else pairs


def _inner(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
    """``<p_a p_b, q_a q_b>``, without forming the products."""
    (p_a, p_b), (q_a, q_b) = ([t.double() for t in pair] for pair in (p, q))
    return float(((p_a.mT @ q_a) * (p_b @ q_b.mT)).sum())
