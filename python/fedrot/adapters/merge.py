"""Several adapters become one, wherever they are; it can be saved, or added to a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fedrot import __version__
from fedrot.adapters import kinds
from fedrot.adapters.adapter import Adapter
from fedrot.adapters.checkpoint import write_checkpoint
from fedrot.adapters.config import Config, base_change
from fedrot.adapters.folder import check_output, write_adapter
from fedrot.adapters.kinds.prompts import KEY as PROMPT
from fedrot.adapters.measure import Misalignment, measure
from fedrot.adapters.sources import check_distinct, read
from fedrot.adapters.spectrum import Spectrum, measure_spectrum
from fedrot.adapters.uploads import Uploads, gather, result, stored
from fedrot.errors import FedrotError
from fedrot.factors import Factors
from fedrot.methods import FedRot, FlexLoRA, Method
from fedrot.options import to_tree
from fedrot.progress import Track, no_progress

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from fedrot.adapters.sources import Source


@dataclass(frozen=True, repr=False)
class Merged:
    """One adapter out of several: PEFT's state dict and configuration, and what they came from.

    `tensors` is what `peft.set_peft_model_state_dict` takes, on the CPU, in the reference's dtypes.
    `config` is the content of `adapter_config.json`: the reference's, with another rank if that
    was asked for. `(tensors, config)` can be given to `aggregate` again. Of another kind than LoRA,
    `factors` has no layers, and `distances` says how far apart the adapters were.
    """

    config: Config
    tensors: dict[str, Tensor]
    factors: Factors
    uploads: Uploads
    method: Method
    spectrum: Spectrum | None = None  # where it decided the ranks
    distances: dict[str, float] | None = None  # None for LoRA; see `kinds.Distances`
    lam: Tensor | None = None  # what was found for "auto": see `Method.aggregate_with_lam`

    def __repr__(self) -> str:
        """Without the values, which are many."""
        kind = self.uploads.target.kind
        of = f"{len(self.uploads.adapters)} adapters, {len(self.tensors)} tensors"
        return f"Merged({kind.title if kind else 'LoRA'}: {of}, {self.method})"

    @property
    def lora_config(self) -> PeftConfig:
        """`config` as PEFT's class: a `LoraConfig` for LoRA."""
        from peft import PeftConfig

        self._check_is_adapter()
        return PeftConfig.from_peft_type(**deepcopy(self.config))

    @property
    def notes(self) -> list[str]:
        """What may make the merge wrong without being an error, as another base model's name."""
        return self.uploads.notes

    @cached_property
    def misalignment(self) -> Misalignment:
        """Rotations and aggregation errors of LoRA, those of `tensors` as they are stored, measured
        when first asked for."""
        if kind := self.uploads.target.kind:
            raise FedrotError(f"{kind.title} has no products B A to measure; see distances")
        return measure(self.uploads, self.method, stored(self.uploads, self.tensors), self.lam)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads, and where it came from.

        Whole parameters are written as `model.safetensors` beside the other files of the
        reference's folder, which they must have come from.

        Raises:
            FedrotError: the folder exists (`force` replaces one that holds an adapter, or a
                merge), or holds one of the adapters that were merged.
        """
        folder, target = Path(folder), self.uploads.target
        model = target.path if target.kind is kinds.FULL else None
        if model is None:
            self._check_is_adapter()
        adapters = [*self.uploads.adapters, target]
        check_output(folder, [a.path for a in adapters if a.path], force)
        if model is None:
            write_adapter(folder, self.config, self.tensors, self._provenance())
        else:
            write_checkpoint(folder, model, self.tensors, self._provenance())

    def add_to(self, model: PeftModel, name: str) -> None:
        """Add the adapter to a model under a new name: loaded, frozen, and not yet active.

        Raises:
            FedrotError: the name is taken, or the model has not the layers of the adapter.
            ValueError: PEFT's own, where it allows one such adapter a model (`bias`).
        """
        from peft import set_peft_model_state_dict

        self._check_is_adapter()
        if name in model.peft_config:
            raise FedrotError(f"name: the model already has an adapter {name!r}")
        if init := base_change(self.config):
            raise FedrotError(
                f"name: adding an adapter with init_lora_weights={init!r} would change the base "
                "weights once more; save() it and load it onto the base model"
            )
        config = self.lora_config
        config.inference_mode = True
        model.add_adapter(name, config)
        try:
            loaded: Any = set_peft_model_state_dict(model, self.tensors, adapter_name=name)
            missing = [key for key in loaded.missing_keys if self._is_own(key, name)]
            # Of virtual tokens PEFT says that it does not know them, and loads them.
            unexpected = [key for key in loaded.unexpected_keys if key != PROMPT]
            if wrong := [*unexpected, *missing]:
                raise FedrotError(f"model: it has not the layers of the adapter: {wrong[0]!r}")
        except Exception:
            model.delete_adapter(name)
            raise

    def _is_own(self, key: str, name: str) -> bool:
        """Whether a model's key is of the adapter `name`, and not of what it wraps."""
        kind = self.uploads.target.kind
        if kind is None:
            return bool(re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", key))
        return key.endswith(f".{name}") and bool(kind.keys.fullmatch(key.removesuffix(f".{name}")))

    def _check_is_adapter(self) -> None:
        if self.uploads.target.kind is kinds.FULL:
            raise FedrotError(
                "whole parameters are no adapter: load_state_dict(merged.tensors) takes them"
            )

    def _provenance(self) -> dict[str, Any]:
        uploads = self.uploads
        weights = uploads.weights.tolist()
        tree = to_tree(self.method)
        used = self.method.takes(tree)
        options = {key: v for key, v in tree.items() if v is not None and key in used}
        return {
            "fedrot_version": __version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "method": {"name": self.method.name, **options},
            "reference": _origin(uploads.target),
            "clients": [
                {**_origin(adapter), "weight": weight}
                for adapter, weight in zip(uploads.adapters, weights, strict=True)
            ],
            "ranks": sorted({layer.rank for layer in uploads.target.keys.layers.values()}),
            **({"spectrum": self.spectrum.summary()} if self.spectrum else {}),
            **self._measured(),
            "notes": uploads.notes,
        }

    def _measured(self) -> dict[str, Any]:
        if self.distances:
            return {"measured": self.distances}
        found = self.misalignment
        return {"measured": found.summary(), "errors": found.by_layer()}


def aggregate(
    adapters: Sequence[Source],
    reference: Source | None = None,
    *,
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    track: Track = no_progress,
) -> Merged:
    """Align adapters to a reference and average them (FedRot-LoRA, arXiv 2602.23638).

    LoRA and DoRA, and beside them LoHa, VeRA, (IA)3, prompt and prefix tuning.

    Each adapter, and the reference, is one of

    - a PEFT folder, or a model's (`config.json`, `model.safetensors` or its shards): whole
      parameters;
    - a `PeftModel`, for its active adapter, or `(model, "name")` for any;
    - `(state_dict, PeftConfig)`, the first as from `peft.get_peft_model_state_dict`;
    - `(state_dict, None)`: whole parameters again, which are averaged plainly.

    Everything runs on the CPU, in float32 (float64 where an input is); inputs are not changed, and
    the result shares no memory with them.

    Args:
        adapters: what to merge.
        reference: what to rotate toward, and whose configuration and dtypes the result has: in a
            federation the global adapter from which the clients started. None: the first adapter.
        weights: one for each adapter, not negative; normalised to sum 1. None: all equal.
        method: `FedRot(lam=1.0)` if None: the whole rotation, on both factors. Any method whose
            result is an adapter alone will do, as `FlexLoRA()`; other kinds than LoRA take
            `FedRot` and `FedIT`.
        rank: a number: pad the reference with zeros to this rank first, so that larger adapters
            fit; with `FlexLoRA`, which can also lower it, the rank of the result. `"auto"`: each
            layer gets the smallest rank that holds the share `energy` of the exact average. The
            method is then `FlexLoRA("reference")` if None, and must be a FlexLoRA. LoRA only.
        energy: in (0, 1], for `rank="auto"`: share of the squared singular values; 1 is the rank
            of the exact average. None: `fedrot.adapters.ENERGY`.
        track: wraps the loops over adapters, and over tensors of other kinds, to show how far they
            are; as `fedrot.progress.progress()` gives it.

    Raises:
        FedrotError: (a `ValueError`) naming the adapter, its layer or key, and the values found,
            where adapters cannot be merged or do not fit together: see docs/adapters.md.
        TypeError: an adapter is none of the above.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(
            "adapters must be a list, as [(model, 'a'), (model, 'b')], "
            f"got {type(adapters).__name__}"
        )
    auto = rank == "auto"
    if not (auto or rank is None or isinstance(rank, Integral)):
        raise FedrotError(f"rank must be a whole number or 'auto', got {rank!r}")
    if not (energy is None or isinstance(energy, Real)):
        raise FedrotError(f"energy must be a number, got {energy!r}")
    if not (method is None or isinstance(method, Method)):
        raise TypeError(f"method must be an instance, as FedRot(lam=1.0), got {method!r}")
    if method is None:
        method = FlexLoRA("reference") if auto else FedRot(lam=1.0)
    if method.folds or method.personal or method.same_A:
        raise FedrotError(f"method: {method.name} needs more than the adapters to merge them")
    if isinstance(method, FedRot) and (method.lag != 1 or method.align == "alternate"):
        raise FedrotError(
            f"method: lag and align='alternate' are of rounds, and a merge is none, got {method}"
        )
    if method.chooses_ranks:
        raise FedrotError(
            f"method: a {method.name} with an energy is for rounds; here rank='auto' chooses the "
            "ranks, and energy=... goes beside it"
        )
    check_distinct(adapters)
    numbered = track(list(enumerate(adapters)), "reading")
    found = [read(source, f"adapters[{index}]") for index, source in numbered]
    if not found:
        raise FedrotError("no adapters to merge")
    target = found[0] if reference is None else read(reference, "reference")
    if target.kind is not None:
        target.kind.check_rank(rank=rank, energy=energy)
    if energy is not None and not auto:
        raise FedrotError(f"energy must go with rank='auto', got energy={energy} and {rank=}")
    if auto and not method.truncates:
        raise FedrotError(
            f"method: rank='auto' is a rank of the exact average, which {method.name} does not "
            "give; FlexLoRA does"
        )
    if isinstance(rank, str):
        spectrum = measure_spectrum(gather(found, target, weights, {}), energy)
        merged = merge(gather(found, target, weights, spectrum.ranks), method, track)
        return replace(merged, spectrum=spectrum)
    if method.truncates and target.kind is None:  # clients of any rank
        ranks = {} if rank is None else dict.fromkeys(target.keys.layers, rank)
        return merge(gather(found, target, weights, ranks), method, track)
    return merge(gather(found, target, weights, rank), method, track)


def merge(uploads: Uploads, method: Method, track: Track = no_progress) -> Merged:
    """Aggregate the factors with `method`, and everything else as it averages that.

    Adapters of another kind than LoRA are aligned as their kind says, then averaged.

    Raises:
        FedrotError: a merged value does not fit into the dtype of the reference's tensor.
    """
    config = uploads.target.config
    if uploads.target.kind is not None:
        uploads, distances = kinds.align(uploads, method, track)
        factors = uploads.reference
        tensors = result(uploads, factors, method, track)
        uploads.check_unchanged()
        summary = distances.summary(uploads.weights)
        return Merged(config, tensors, factors, uploads, method, distances=summary)
    factors, lam = method.aggregate_with_lam(uploads.clients, uploads.like, uploads.weights)
    tensors = result(uploads, factors, method, track)
    return Merged(config, tensors, factors, uploads, method, lam=lam)


def _origin(adapter: Adapter) -> dict[str, Any]:
    if adapter.path is None:
        return {"given as": adapter.source}
    return {"path": str(adapter.path), "sha256": adapter.sha256}
