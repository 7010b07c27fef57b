"""From the keys of a PEFT state dict to layers of LoRA factors, and back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedrot.adapters.config import Config, rank_and_scaling
from fedrot.errors import FedrotError

PREFIX = "base_model.model."

# Module names under which transformers keep embeddings that PEFT saves whole (resized vocabulary).
EMBEDDING_NAMES = frozenset(
    {*("embed_tokens", "lm_head", "wte", "word_embeddings", "shared"), "embed_in", "embed_out"}
)

_FACTOR = re.compile(r"(?P<name>.+)\.(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])")
_LORA_PART = re.compile(r"\.lora_\w+(\.|$)")
# The same in a model, where the adapter may be named.
_NAMED = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_NAMED_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")


@dataclass(frozen=True)
class Layer:
    """One adapted module: its two state-dict keys, and the rank and scaling of its factors.

    `A` is stored (r, k) and `B` (d, r), for Linear and Embedding; a convolution stores
    `A` (r, in, kh, kw) and `B` (d, r, 1, 1), which `matrix` flattens to the same.
    """

    name: str
    key_A: str
    key_B: str
    rank: int
    scaling: float

    @property
    def module(self) -> str:
        """The name that PEFT matches patterns against: inside the base model, the adapted module.

        A `MultiheadAttention` keeps its output projection's factors under `.base_layer`.
        """
        return self.name.split(".base_layer", 1)[0]


@dataclass(frozen=True)
class StateKeys:
    """Every key of a state dict, sorted by what has to be done with it."""

    layers: dict[str, Layer]
    lora_biases: dict[str, str]  # key of `lora_B.bias` -> layer name: enters times the scaling
    magnitudes: tuple[str, ...]  # DoRA magnitude vectors
    plain: tuple[str, ...]  # whole parameters: modules_to_save, biases, embeddings


def sort_keys(tensors: Mapping[str, Tensor], config: Config, path: Path) -> StateKeys:
    """Sort the keys of a state dict; raises `FedrotError` naming a key that has no known meaning.

    Also checks that each layer has both factors, of the shape and rank that `config` promises.
    """
    factors: dict[str, dict[str, str]] = {}
    lora_biases: dict[str, str] = {}
    magnitudes: list[str] = []
    plain: list[str] = []
    for key in sorted(tensors):
        if match := _FACTOR.fullmatch(key):
            side = "A" if "_A" in match["factor"] else "B"
            factors.setdefault(_layer_name(match["name"]), {})[side] = key
        elif key.endswith(".lora_B.bias"):
            lora_biases[key] = _layer_name(key.removesuffix(".lora_B.bias"))
        elif key.endswith(".lora_magnitude_vector"):
            magnitudes.append(key)
        elif _is_plain(key, tensors, config):
            plain.append(key)
        else:
            raise FedrotError(f"{path}: unknown key {key!r} in the state dict")
    if not factors:
        raise FedrotError(f"{path}: the state dict has no LoRA factors")
    layers = {
        name: _layer(name, keys, tensors, config, path) for name, keys in sorted(factors.items())
    }
    return StateKeys(layers, lora_biases, tuple(magnitudes), tuple(plain))


def matrix(factor: Tensor) -> Tensor:
    """A factor as the matrix it stands for: (r, in, kh, kw) -> (r, k), (d, r, 1, 1) -> (d, r)."""
    return factor.flatten(1)


def _layer(
    name: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], config: Config, path: Path
) -> Layer:
    for side in "AB":
        if side not in keys:
            raise FedrotError(f"{path}: layer {name!r} has no factor {side}")
    layer = Layer(name, keys["A"], keys["B"], 0, 0.0)
    rank, scaling = rank_and_scaling(config, layer.module)
    A, B = tensors[layer.key_A], tensors[layer.key_B]
    if A.ndim < 2 or B.ndim < 2 or 0 in (*A.shape, *B.shape):
        raise FedrotError(
            f"{path}: layer {name!r} has factors of shape {tuple(A.shape)} and {tuple(B.shape)}; "
            "empty or 1-D factors come from shards that were not gathered before saving"
        )
    if A.shape[0] != rank:
        raise FedrotError(
            f"{path}: layer {name!r} has A of shape {tuple(A.shape)}, "
            f"but the configuration gives it rank {rank}"
        )
    if B.ndim > 2 and B.shape[1] != rank and rank % B.shape[1] == 0:
        raise FedrotError(
            f"{path}: layer {name!r} is a grouped convolution; its B is block-diagonal, "
            "which a rotation would fill"
        )
    if matrix(B).shape[1] != rank:
        raise FedrotError(
            f"{path}: layer {name!r} has B of shape {tuple(B.shape)}, "
            f"but A of shape {tuple(A.shape)}"
        )
    return Layer(layer.name, layer.key_A, layer.key_B, rank, scaling)


def _layer_name(key_prefix: str) -> str:
    return key_prefix.removeprefix(PREFIX)


def _is_plain(key: str, tensors: Mapping[str, Tensor], config: Config) -> bool:
    if _LORA_PART.search(key):
        return False
    parts = key.split(".")
    if config.get("trainable_token_indices") and parts[-1] == "trainable_tokens_delta":
        return True
    if config.get("bias", "none") != "none" and parts[-1] == "bias":
        return True
    saved: Sequence[str] = config.get("modules_to_save") or ()
    if any(f".{module}." in f".{key}" for module in saved):
        return True
    return _is_embedding(key, tensors)


def _is_embedding(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """PEFT saves embeddings whole where they are adapted or their vocabulary was resized."""
    if not key.endswith(".weight"):
        return False
    module = key.removesuffix(".weight").removesuffix(".base_layer")
    adapted = f"{module}.lora_embedding_A" in tensors
    return adapted or module.rsplit(".", 1)[-1] in EMBEDDING_NAMES


def factor_keys(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The keys of `A` and `B` of every layer, where no configuration says which layers there are.

    Takes PEFT's names with the adapter's (`...lora_A.default.weight`, as of parameters) and
    without (`...lora_A.weight`, as in a saved state dict). Other keys are left out; layers are
    sorted by name.

    Raises:
        ValueError: a layer has one factor without the other, or parts that may forbid to rotate
            its factors, as the diagonal that AdaLoRA puts between them.
    """
    found: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        if factor := factor_of(key):
            layer, side = factor
            found.setdefault(layer, {})[side] = key
        elif _LORA_PART.search(key) and not _BESIDE_FACTORS.fullmatch(key):
            raise ValueError(f"{key!r} may forbid to rotate the factors of its layer")
    for sides in found.values():
        for side, other in ("AB", "BA"):
            if side not in sides:
                raise ValueError(f"{sides[other]!r} has no factor {side}: alignment needs both")
    return {layer: (sides["A"], sides["B"]) for layer, sides in sorted(found.items())}


def factor_of(key: str) -> tuple[str, str] | None:
    """The layer and the side, `"A"` or `"B"`, of a key; None where it is no factor's."""
    match = _NAMED.fullmatch(key) or _NAMED_EMBEDDING.fullmatch(key)
    if match is None:
        return None
    name, side, adapter = match.groups()
    suffix = f" ({adapter})" if adapter and adapter != "default" else ""
    return _layer_name(name) + suffix, side


# What may stand beside the factors: `lora_bias`, and the magnitudes of DoRA.
_BESIDE_FACTORS = re.compile(r".+\.lora_(B(\.[^.]+)?\.bias|magnitude_vector(\..+)?)")
