"""Adapters other than LoRA: which there are, and which are refused.

Where a method takes LoRA factors and finds rotations for all clients at once, an adapter of another
`Kind` is aligned by itself, tensor for tensor, and everything is averaged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedrot.adapters.config import Config, check_config
from fedrot.adapters.kinds.base import Kind, Plain, Tensors
from fedrot.adapters.kinds.hadamard import LoHa
from fedrot.adapters.kinds.prompts import PrefixTuning, PromptTuning
from fedrot.adapters.kinds.vectors import IA3, Full, Vera
from fedrot.errors import FedrotError
from fedrot.methods import FedRot, Method
from fedrot.progress import Track, no_progress

if TYPE_CHECKING:
    from fedrot.adapters.adapter import Adapter
    from fedrot.adapters.uploads import Uploads

__all__ = ["FULL", "KINDS", "REFUSED_TYPES", "Distances", "Kind", "align", "kind_of", "length"]

FULL = Full()

# By `peft_type`. LoRA and DoRA are not here: a method merges their factors.
KINDS: dict[str, Kind] = {
    kind.peft_type: kind for kind in (LoHa(), Vera(), IA3(), PromptTuning(), PrefixTuning())
}

_MERGE = (
    "merge each into its model (merge_and_unload) and aggregate the weights that all started "
    "from one base with, as (model.state_dict(), None)"
)

# The types of which somebody is most likely to have several, and why not; all others: unknown.
REFUSED_TYPES: dict[str, str] = {
    "ADALORA": f"a diagonal stands between its factors, and each layer's rank is its own; {_MERGE}",
    "LOKR": f"a Kronecker product has no rotation that acts on one of its factors alone; {_MERGE}",
    "OFT": f"the mean of orthogonal matrices is not orthogonal; {_MERGE}",
    "BOFT": f"the mean of orthogonal matrices is not orthogonal; {_MERGE}",
    "HRA": f"the mean of reflections is no reflection; {_MERGE}",
    "VBLORA": f"it stores which vectors of a bank to use, and an index has no mean; {_MERGE}",
    "XLORA": "it routes tokens between adapters; aggregate the LoRA adapters that it routes to",
    "P_TUNING": (
        "PEFT saves the prompt that its encoder makes and not the encoder, so what is merged "
        "could not be trained further; train PROMPT_TUNING"
    ),
    "MULTITASK_PROMPT_TUNING": (
        "its prompts are products of a shared one and factors by task; train PROMPT_TUNING"
    ),
    "ADAPTION_PROMPT": "its prompts enter through gates of their own; train PREFIX_TUNING",
    "CPT": "its prompt is text with bounded changes, token by token; train PROMPT_TUNING",
    "CARTRIDGE": "its frozen first tokens must stay in place; train PREFIX_TUNING",
}


def kind_of(config: Config, source: str) -> Kind | None:
    """The kind of an adapter whose configuration can be merged; None for LoRA.

    Raises:
        FedrotError: naming the source, what cannot be merged, and what to do instead.
    """
    peft_type = config.get("peft_type")
    if kind := KINDS.get(str(peft_type)):
        kind.check_config(config, source)
        return kind
    if peft_type != "LORA" and peft_type is not None:
        known = ", ".join(["LORA", *KINDS])
        reason = REFUSED_TYPES.get(
            str(peft_type), f"nobody has worked out what its tensors have in common; {_MERGE}"
        )
        raise FedrotError(f"{source}: peft_type is {peft_type!r}, not {known}: {reason}")
    check_config(config, source)
    return None


@dataclass(frozen=True)
class Distances:
    """How far from the reference adapters are, ``|T_i - T_ref|`` over the tensors of their kind,
    integers left out."""

    plain: tuple[float, ...]  # of every adapter, as it is
    aligned: tuple[float, ...]

    def summary(self, weights: Tensor) -> dict[str, float]:
        """``sqrt(sum_i w_i |T_i - T_ref|²)``: ``distance_plain`` and ``distance_aligned``."""

        def mean(values: tuple[float, ...]) -> float:
            return sum(w * v**2 for w, v in zip(weights.tolist(), values, strict=True)) ** 0.5

        return {"distance_plain": mean(self.plain), "distance_aligned": mean(self.aligned)}


def align(
    uploads: Uploads, method: Method, track: Track = no_progress
) -> tuple[Uploads, Distances]:
    """Every adapter in the reference's coordinates, ready to be averaged.

    Returns:
        The uploads with the adapters changed and notes added; and the distances from the reference.

    Raises:
        FedrotError: the method, or an option of it, says nothing about this kind.
    """
    target = uploads.target
    kind = target.kind
    assert kind is not None
    kind.check_method(method)
    names = _names(target, kind)
    dtype = _working_dtype([*uploads.adapters, target], names)

    def own(adapter: Adapter) -> Tensors:
        found = {key: adapter.tensors[key] for key in names}
        if isinstance(kind, Plain):  # perhaps a whole model, of which there is no second copy
            return found
        scales = {key: kind.scale(adapter.config, target.config, key) for key in names}
        return {key: t.to(dtype) * scales[key] for key, t in found.items()}

    reference = own(target)
    rotation = method if isinstance(method, FedRot) and method.lam != 0 else None
    adapters, notes = [], list(uploads.notes)
    plain, aligned = [], []
    for adapter in track(uploads.adapters, "aligning"):
        moved, note = own(adapter), ""
        plain.append(_distance(moved, reference))
        aligned.append(plain[-1])
        if rotation is not None and not isinstance(kind, Plain):
            moved, note = kind.align(moved, reference, target.config, rotation)
            aligned[-1] = _distance(moved, reference)
        notes += [f"{adapter.source}: {note}"] if note else []
        adapters.append(dataclasses.replace(adapter, tensors={**adapter.tensors, **moved}))
    changed = dataclasses.replace(uploads, adapters=adapters, notes=notes)
    return changed, Distances(tuple(plain), tuple(aligned))


def length(adapter: Adapter) -> float:
    """``|T|``, as :class:`Distances` measures."""
    assert adapter.kind is not None
    return _length(adapter.tensors[key] for key in _names(adapter, adapter.kind))


def _names(adapter: Adapter, kind: Kind) -> list[str]:
    return [key for key in adapter.keys.plain if kind.keys.fullmatch(key)]


def _working_dtype(adapters: list[Adapter], names: list[str]) -> torch.dtype:
    wide = any(a.tensors[key].dtype == torch.float64 for a in adapters for key in names)
    return torch.float64 if wide else torch.float32


def _distance(ours: Tensors, theirs: Tensors) -> float:
    # Where the reference has integers, all count as such.
    floats = [key for key, t in theirs.items() if t.is_floating_point()]
    return _length(ours[key].double() - theirs[key].double() for key in floats)


def _length(tensors: Iterable[Tensor]) -> float:
    squares = (t.double().square().sum() for t in tensors if t.is_floating_point())
    return sum(map(float, squares)) ** 0.5
