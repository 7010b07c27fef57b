"""Several adapters on one scale, ready for a method; and its result in the form they have."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrot.adapters.adapter import Adapter
from fedrot.adapters.config import MUST_AGREE, Config, base_change, with_ranks
from fedrot.adapters.kinds import FULL
from fedrot.adapters.layers import Layer
from fedrot.errors import FedrotError
from fedrot.factors import Factors, resized
from fedrot.methods import Method
from fedrot.progress import Track, no_progress

DORA_NOTE = (
    "DoRA: A and B are aligned like any LoRA; averaging the magnitude vectors is an approximation"
)


@dataclass(frozen=True, repr=False)
class Uploads:
    """The factors of all clients and of the reference, on the reference's scale, and all else.

    The factors are float32 (float64 where an input is float64), so that a bf16 adapter is
    rounded once, at the end.
    """

    clients: list[Factors]
    reference: Factors  # zero-padded where a client has a larger rank
    weights: Tensor  # (N,), float64, sum 1
    target: Adapter  # the reference in the wanted ranks: says what the result looks like
    adapters: list[Adapter]
    notes: list[str]

    def __repr__(self) -> str:
        """Without the values, which are many."""
        return f"Uploads({len(self.adapters)} adapters, toward {self.target!r})"

    @property
    def like(self) -> Factors:
        """The reference in the ranks of the result, padded or cut: what a method gets."""
        ranks = {p: n.rank for n in self.target.keys.layers.values() for p in n.pairs}
        return resized(self.reference, ranks)

    def check_unchanged(self) -> None:
        """Raise `FedrotError` naming a file that is mapped and has changed meanwhile."""
        for adapter in (*self.adapters, self.target):
            for mapped in adapter.mapped:
                mapped.check()

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling of each pair: factors times its square root give `dW = s B A`."""
        layers = self.target.keys.layers.values()
        return {pair: layer.scaling for layer in layers for pair in layer.pairs}


def gather(
    adapters: Sequence[Adapter],
    reference: Adapter,
    weights: Sequence[float] | None = None,
    rank: int | Mapping[str, int] | None = None,
) -> Uploads:
    """Check that the adapters can be merged and bring their factors to the reference's scale.

    With scalings `s_i` and `s_ref`, both factors of client `i` are multiplied by
    `sqrt(s_i / s_ref)`, so `s_ref B A` is what `s_i B_i A_i` was.

    `rank`: a number first pads every layer of the reference that has less with zeros; no client
    may have more. A mapping is the ranks of the result by layer, those it leaves out keep the
    reference's: for a method that `truncates`, so clients may have any rank.

    Raises:
        FedrotError: naming the adapter, the key and both values, where they do not fit.
    """
    if not adapters:
        raise FedrotError("no adapters to merge")
    if reference.kind is not None:
        reference.kind.check_rank(rank=rank)
    for adapter in adapters:
        _check_same_meaning(adapter, reference)
        _check_same_keys(adapter, reference)
    largest = max(_largest_ranks(adapters).values(), default=0)
    target = padded = _resized(reference, _ranks(reference, rank, largest))
    if isinstance(rank, Mapping):
        padded = _resized(reference, _largest_ranks([*adapters, reference]))
    for adapter in adapters:
        _check_shapes(adapter, padded, largest)
        _check_base_change(adapter, target)
        if reference.kind is not None:
            reference.kind.check_fit(adapter, reference)
    _check_base_change(reference, target)
    dtype = _working_dtype([*adapters, reference])
    return Uploads(
        [_factors(adapter, target, dtype) for adapter in adapters],
        _factors(padded, target, dtype),
        _normalised(weights, len(adapters)),
        target,
        list(adapters),
        _notes(adapters, reference),
    )


def result(
    uploads: Uploads, factors: Factors, method: Method, track: Track = no_progress
) -> dict[str, Tensor]:
    """The tensors of the result: the factors as they are stored, all else as the method averages.

    `factors`: what the method made of the uploads. Each tensor has the dtype of the reference's.
    """
    target = uploads.target
    tensors = dict(target.tensors)
    for layer in target.keys.layers.values():
        A, B = layer.join(factors.A, factors.B)
        tensors[layer.key_A] = _like(A, tensors[layer.key_A])
        tensors[layer.key_B] = _like(B, tensors[layer.key_B])
    tensors.update(_rest(uploads, method, track))
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FedrotError(f"the merged {key!r} does not fit into {tensor.dtype}")
    return {key: t.clone() if t is target.tensors[key] else t for key, t in tensors.items()}


def stored(uploads: Uploads, tensors: dict[str, Tensor]) -> Factors:
    """The factors as a result holds them, rounded to its dtypes."""
    target, (A, *_) = uploads.target, uploads.reference.A.values()
    return _factors(dataclasses.replace(target, tensors=tensors), target, A.dtype)


def _ranks(
    reference: Adapter, rank: int | Mapping[str, int] | None, largest: int
) -> dict[str, int]:
    """`largest`: rank of any client."""
    ranks = {name: layer.rank for name, layer in reference.keys.layers.items()}
    given = list(rank.values()) if isinstance(rank, Mapping) else [] if rank is None else [rank]
    if given and min(given) < 1:
        raise FedrotError(f"rank must be at least 1, got {min(given)}")
    full = (_full_rank(layer, reference) for layer in reference.keys.layers.values())
    if given and max(given) > (most := max([largest, *ranks.values(), *full])):
        raise FedrotError(
            f"rank must be at most {most}, the full rank of the largest layer (or the largest "
            f"rank there is), got {max(given)}"
        )
    if isinstance(rank, Mapping):
        return {**ranks, **rank}
    if rank is not None and ranks and rank < min(ranks.values()):
        raise FedrotError(
            f"rank must be at least {min(ranks.values())}, that of the reference, got {rank}: "
            "padding only raises it; FlexLoRA (--rule exact) can lower it"
        )
    return {name: max(own, rank or 0) for name, own in ranks.items()}


def _full_rank(layer: Layer, adapter: Adapter) -> int:
    return max(min(A.shape[1], B.shape[0]) for _, A, B in layer.split(adapter.tensors))


def _largest_ranks(adapters: Sequence[Adapter]) -> dict[str, int]:
    names = adapters[0].keys.layers
    return {name: max(a.keys.layers[name].rank for a in adapters) for name in names}


def _resized(reference: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The reference with these ranks, padded or cut, and a configuration that says so."""
    layers = reference.keys.layers
    if all(ranks[name] == layer.rank for name, layer in layers.items()):
        return reference
    tensors = dict(reference.tensors)
    for name, layer in layers.items():
        tensors[layer.key_A], tensors[layer.key_B] = layer.resized(tensors, ranks[name])
    config = with_ranks(
        reference.config,
        {target: ranks[name] for name, layer in layers.items() for target in layer.targets},
        {target: layer.scaling for layer in layers.values() for target in layer.targets},
    )
    resized = {name: dataclasses.replace(layer, rank=ranks[name]) for name, layer in layers.items()}
    keys = dataclasses.replace(reference.keys, layers=resized)
    return dataclasses.replace(reference, config=config, tensors=tensors, keys=keys)


def _check_same_meaning(adapter: Adapter, reference: Adapter) -> None:
    if adapter.kind is not reference.kind:
        ours, theirs = (a.kind.title if a.kind else "LoRA" for a in (adapter, reference))
        raise FedrotError(
            f"{adapter.source}: is {ours}, the reference {reference.source} is {theirs}"
        )
    fields = MUST_AGREE if reference.kind is None else reference.kind.must_agree
    for field, default in fields.items():
        ours, theirs = (_setting(a.config, field, default) for a in (adapter, reference))
        if ours != theirs:
            raise FedrotError(
                f"{adapter.source}: {field} is {ours!r}, "
                f"the reference {reference.source} has {theirs!r}"
            )


def _setting(config: Config, field: str, default: Any) -> Any:
    value = config.get(field, default) or default
    # PEFT sorts the first itself; the other is a set.
    named = field in ("target_parameters", "feedforward_modules")
    return sorted(value) if named and isinstance(value, list) else value


def _check_same_keys(adapter: Adapter, reference: Adapter) -> None:
    ours, theirs = adapter.tensors.keys(), reference.tensors.keys()
    for what, keys in (("lacks", theirs - ours), ("has in addition", ours - theirs)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise FedrotError(
                f"{adapter.source}: other layers than the reference {reference.source}: {what} "
                + ", ".join(sorted(keys)[:3])
                + more
            )


def _check_shapes(adapter: Adapter, target: Adapter, largest: int) -> None:
    for name, layer in adapter.keys.layers.items():
        wanted = target.keys.layers[name]
        if layer.rank > wanted.rank:
            raise FedrotError(
                f"{adapter.source}: layer {name!r} has rank {layer.rank}, the reference only "
                f"{wanted.rank}; rank={largest} (--rank {largest}) pads the reference first"
            )
        if layer.experts != wanted.experts:
            raise FedrotError(
                f"{adapter.source}: layer {name!r} has {layer.experts} experts, the reference "
                f"{wanted.experts}"
            )
    layers = adapter.keys.layers.values()
    dim = {layer.key_A: 0 for layer in layers} | {layer.key_B: 1 for layer in layers}
    for key, tensor in adapter.tensors.items():
        wanted_shape = target.tensors[key].shape
        if _without(dim.get(key), tensor.shape) != _without(dim.get(key), wanted_shape):
            raise FedrotError(
                f"{adapter.source}: {key!r} has shape {tuple(tensor.shape)}, "
                f"the reference {target.source} has {tuple(wanted_shape)}"
            )


def _without(rank_dim: int | None, shape: torch.Size) -> list[int]:
    return [n for dim, n in enumerate(shape) if dim != rank_dim]


def _check_base_change(adapter: Adapter, target: Adapter) -> None:
    """PiSSA and OLoRA subtract `s B_0 A_0` from the base: the same one only for equal r and s."""
    ours, theirs = base_change(adapter.config), base_change(target.config)
    if ours != theirs:
        raise FedrotError(
            f"{adapter.source}: init_lora_weights is {adapter.config.get('init_lora_weights')!r}, "
            f"the reference has {target.config.get('init_lora_weights')!r}: their base weights "
            "are not the same"
        )
    if ours is None:
        return
    for name, layer in adapter.keys.layers.items():
        wanted = target.keys.layers[name]
        if (layer.rank, layer.scaling) != (wanted.rank, wanted.scaling):
            raise FedrotError(
                f"{adapter.source}: init_lora_weights={ours!r} changed the base weights for rank "
                f"{layer.rank} and scaling {layer.scaling:g} in layer {name!r}; "
                f"the result would have rank {wanted.rank} and scaling {wanted.scaling:g}"
            )


def _working_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    float64 = any(
        tensor.dtype == torch.float64 for adapter in adapters for tensor in adapter.tensors.values()
    )
    return torch.float64 if float64 else torch.float32


def _factors(adapter: Adapter, target: Adapter, dtype: torch.dtype) -> Factors:
    A, B = {}, {}
    for name, wanted in target.keys.layers.items():
        layer = adapter.keys.layers[name]
        root = math.sqrt(layer.scaling / wanted.scaling)
        for pair, A_pair, B_pair in layer.split(adapter.tensors):
            A[pair], B[pair] = A_pair.to(dtype), B_pair.to(dtype)
            # Else as they lie in memory, since there may be many; but a model may train on.
            if root != 1 or adapter.path is None:
                A[pair], B[pair] = A[pair] * root, B[pair] * root
    return Factors(A, B)


def _normalised(weights: Sequence[float] | None, n: int) -> Tensor:
    given = [1.0] * n if weights is None else list(weights)
    if len(given) != n:
        raise FedrotError(f"weights: {len(given)} values for {n} adapters")
    try:
        w = torch.tensor([float(weight) for weight in given], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise FedrotError(f"weights must be numbers, one for each adapter, got {given}") from error
    if not torch.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise FedrotError(
            f"weights must be finite, not negative, and not all zero, got {w.tolist()}"
        )
    w = w / w.max()  # the sum of finite weights may overflow
    return w / w.sum()


def _rest(uploads: Uploads, method: Method, track: Track) -> dict[str, Tensor]:
    """All but the factors."""
    keys = uploads.target.keys
    rest = (*keys.magnitudes, *keys.plain, *keys.lora_biases)
    if uploads.target.kind is None:
        return _averaged(uploads, method, rest)
    # Means, of one tensor after the other: a whole model is never in float64 at once.
    tensors: dict[str, Tensor] = {}
    for key in track(rest, "averaging"):
        tensors |= _averaged(uploads, method, (key,))
    return tensors


def _averaged(uploads: Uploads, method: Method, keys: Sequence[str]) -> dict[str, Tensor]:
    """As the method averages them; a `lora_B.bias` enters times the scaling of its adapter."""
    target = uploads.target
    like = {key: target.tensors[key] for key in keys}

    def own(adapter: Adapter) -> dict[str, Tensor]:
        tensors = {key: adapter.tensors[key] for key in keys}
        for key in target.keys.lora_biases.keys() & tensors.keys():
            name = target.keys.lora_biases[key]
            scaling = adapter.keys.layers[name].scaling / target.keys.layers[name].scaling
            tensors[key] = scaling * tensors[key].double()
        return tensors

    found = method.average_rest([own(a) for a in uploads.adapters], like, uploads.weights)
    return {
        key: _like(found[key] if t.is_floating_point() else found[key].round(), t)
        for key, t in like.items()
    }


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    return value.reshape(tensor.shape).to(tensor.dtype).contiguous()


def _notes(adapters: Sequence[Adapter], reference: Adapter) -> list[str]:
    notes = []
    for adapter in adapters:
        if reference.kind is FULL and adapter.config and reference.config:
            notes += _other_model(adapter, reference)
            continue
        for field in ("base_model_name_or_path", "revision"):
            ours, theirs = adapter.config.get(field), reference.config.get(field)
            if ours != theirs:
                notes.append(
                    f"{adapter.source}: {field} is {ours!r}, the reference has {theirs!r}; "
                    "merging is only right on one base model"
                )
    if reference.keys.magnitudes:
        notes.append(DORA_NOTE)
    return notes


def _other_model(adapter: Adapter, reference: Adapter) -> list[str]:
    """What the configurations of two models say of them, and not of how they were saved."""
    said = {*adapter.config, *reference.config} - {
        *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    }
    return [
        f"{adapter.source}: config.json has {field}={adapter.config.get(field)!r}, the reference "
        f"{reference.config.get(field)!r}; merging is only right of one model"
        for field in sorted(said)
        if adapter.config.get(field) != reference.config.get(field)
    ]
