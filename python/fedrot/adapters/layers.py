"""From the keys of a PEFT state dict to layers of LoRA factors, and back."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrot.adapters.config import Config, rank_and_scaling, targeted_parameters
from fedrot.errors import FedrotError

PREFIX = "base_model.model."

# Module names under which transformers keep embeddings that PEFT saves whole (resized vocabulary).
EMBEDDING_NAMES = frozenset(
    {*("embed_tokens", "lm_head", "wte", "word_embeddings", "shared"), "embed_in", "embed_out"}
)

GIVE_THE_MODEL = "load the adapter with PEFT and give fedrot.aggregate the model"

_FACTOR = re.compile(r"(?P<name>.+)\.(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])")
_LORA_PART = re.compile(r"\.lora_\w+(\.|$)")
# The same in a model, where the adapter may be named.
_NAMED = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_NAMED_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_NAMED_FACTOR = re.compile(r".+\.lora_([AB]|embedding_[AB])\.[^.]+(\.weight)?")


@dataclass(frozen=True)
class Layer:
    """One pair of state-dict keys, and the rank and scaling of the factors they hold.

    `A` is stored (r, k) and `B` (d, r), for Linear and Embedding; a convolution stores
    `A` (r, in, kh, kw) and `B` (d, r, 1, 1), which is flattened to the same. The parameter of a
    mixture of experts (`target_parameters`) stores all experts side by side: `A` (E r, k) is
    (E, r, k), and `B` (d, r E) is (d, r, E).
    """

    name: str
    key_A: str
    key_B: str
    rank: int
    scaling: float
    targets: tuple[str, ...]  # what PEFT matches patterns against, inside the base model
    experts: int = 1

    @property
    def pairs(self) -> list[str]:
        """The names of its pairs of factors. Every expert is one, with a basis of its own."""
        if self.experts == 1:
            return [self.name]
        return [f"{self.name}[{expert}]" for expert in range(self.experts)]

    def split(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each pair: its name, `A` (r, k) and `B` (d, r)."""
        A, B = self._by_expert(tensors)
        return zip(self.pairs, A.flatten(2), B.movedim(2, 0).flatten(2), strict=True)

    def join(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `split` came from, up to the shape in which a convolution is stored."""
        return (
            torch.stack([A[pair] for pair in self.pairs]).flatten(0, 1),
            torch.stack([B[pair] for pair in self.pairs], 2).flatten(1),
        )

    def resized(self, tensors: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """Both tensors as they are stored, in another rank: zeros at the end keep every product,
        and a smaller rank the first rows of `A` and columns of `B`."""
        A, B = self._by_expert(tensors)
        extra = (0, rank - self.rank)  # negative: cut
        A = pad(A, (0, 0) * (A.ndim - 2) + extra)
        B = pad(B, (0, 0) * (B.ndim - 2) + extra)
        return A.flatten(0, 1), B.flatten(1, 2)

    def _by_expert(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (
            tensors[self.key_A].unflatten(0, (self.experts, self.rank)),
            tensors[self.key_B].unflatten(1, (self.rank, self.experts)),
        )


@dataclass(frozen=True)
class StateKeys:
    """Every key of a state dict, sorted by what has to be done with it."""

    layers: dict[str, Layer]
    lora_biases: dict[str, str]  # key of `lora_B.bias` -> layer name: enters times the scaling
    magnitudes: tuple[str, ...]  # DoRA magnitude vectors
    plain: tuple[str, ...]  # whole parameters: modules_to_save, biases, embeddings


def sort_keys(
    tensors: Mapping[str, Tensor],
    config: Config,
    source: str,
    parameters: Mapping[str, str] | None = None,
) -> StateKeys:
    """Sort the keys of a state dict; raises `FedrotError` naming a key that has no known meaning.

    Also checks that each layer has both factors, of the shape and rank that `config` promises.
    `parameters`: where a model is at hand, the parameter that each layer adapts which
    `target_parameters` made, by the layer's name; None leaves it to the configuration.
    """
    factors: dict[str, dict[str, str]] = {}
    lora_biases: dict[str, str] = {}
    magnitudes: list[str] = []
    plain: list[str] = []
    for key in sorted(tensors):
        if match := _FACTOR.fullmatch(key):
            side = "A" if "_A" in match["factor"] else "B"
            factors.setdefault(module_of(match["name"]), {})[side] = key
        elif key.endswith(".lora_B.bias"):
            lora_biases[key] = module_of(key.removesuffix(".lora_B.bias"))
        elif key.endswith(".lora_magnitude_vector"):
            magnitudes.append(key)
        elif is_plain(key, tensors, config):
            plain.append(key)
        else:
            hint = "; peft.get_peft_model_state_dict gives the keys without an adapter's name"
            named = hint if _NAMED_FACTOR.fullmatch(key) else ""
            raise FedrotError(f"{source}: unknown key {key!r} in the state dict{named}")
    if not factors:
        raise FedrotError(f"{source}: the state dict has no LoRA factors")
    if parameters is None:
        _check_parameters_name_modules(config, source)
    layers = {}
    for name, keys in sorted(factors.items()):
        for side in "AB":
            if side not in keys:
                raise FedrotError(f"{source}: layer {name!r} has no factor {side}")
        layer = _layer(name, keys, config, source, parameters)
        layers[name] = _checked(layer, tensors[layer.key_A], tensors[layer.key_B], source)
    return StateKeys(layers, lora_biases, tuple(magnitudes), tuple(plain))


def _check_parameters_name_modules(config: Config, source: str) -> None:
    for target in config.get("target_parameters") or ():
        if "." not in target:
            raise FedrotError(
                f"{source}: target_parameters {target!r} names no module, so which layers hold "
                f"experts only the model says: {GIVE_THE_MODEL}"
            )


def _layer(
    name: str,
    keys: Mapping[str, str],
    config: Config,
    source: str,
    parameters: Mapping[str, str] | None,
) -> Layer:
    """The layer as the configuration describes it; `experts=0` where its tensors have to say."""
    # A MultiheadAttention keeps its output projection's factors under `.base_layer`, and the
    # second parameter of a module is wrapped around the first.
    module = name.split(".base_layer", 1)[0]
    if parameters is None:
        found = targeted_parameters(config, module)
    else:
        found = (parameters[name],) if name in parameters else ()
    targets = found or (module,)
    ranks = {rank_and_scaling(config, target) for target in targets}
    if len(ranks) > 1:
        raise FedrotError(
            f"{source}: layer {name!r} adapts one of {', '.join(targets)}, to which rank_pattern "
            "or alpha_pattern give different ranks or scalings; which one only the model says: "
            + GIVE_THE_MODEL
        )
    ((rank, scaling),) = ranks
    return Layer(name, keys["A"], keys["B"], rank, scaling, targets, experts=0 if found else 1)


def _checked(layer: Layer, A: Tensor, B: Tensor, source: str) -> Layer:
    """The layer with its number of experts, if the tensors have the shapes that it promises."""
    name, rank = layer.name, layer.rank
    if A.ndim < 2 or B.ndim < 2 or 0 in (*A.shape, *B.shape):
        raise FedrotError(
            f"{source}: layer {name!r} has factors of shape {tuple(A.shape)} and {tuple(B.shape)}; "
            "empty or 1-D factors come from shards that were not gathered before saving"
        )
    experts = layer.experts or A.shape[0] // rank
    if A.shape[0] != experts * rank:
        raise FedrotError(
            f"{source}: layer {name!r} has A of shape {tuple(A.shape)}, "
            f"but the configuration gives it rank {rank}"
        )
    if B.ndim > 2 and B.shape[1] != rank and rank % B.shape[1] == 0:
        raise FedrotError(
            f"{source}: layer {name!r} is a grouped convolution; its B is block-diagonal, "
            "which a rotation would fill"
        )
    if B.flatten(1).shape[1] != A.shape[0]:
        raise FedrotError(
            f"{source}: layer {name!r} has B of shape {tuple(B.shape)}, "
            f"but A of shape {tuple(A.shape)}"
        )
    return Layer(name, layer.key_A, layer.key_B, rank, layer.scaling, layer.targets, experts)


def module_of(key_prefix: str) -> str:
    """The name of a module inside the base model."""
    return key_prefix.removeprefix(PREFIX)


def is_plain(key: str, tensors: Mapping[str, Tensor], config: Config) -> bool:
    """Whether a tensor is a whole parameter that was trained beside the adapter."""
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
    return module_of(name) + suffix, side


# What may stand beside the factors: `lora_bias`, and the magnitudes of DoRA.
_BESIDE_FACTORS = re.compile(r".+\.lora_(B(\.[^.]+)?\.bias|magnitude_vector(\..+)?)")
