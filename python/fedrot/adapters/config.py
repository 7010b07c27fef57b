"""What the configuration of a LoRA adapter says: can it be averaged, its ranks and its scalings.

Only the configuration is read here, never a base model. Every field of PEFT's `LoraConfig` is
either in `NEUTRAL` (its value does not change how `B A` enters the model), in `MUST_AGREE`
(averaging is right when all adapters say the same), handled by `rank_and_scaling`, or refused.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedrot.errors import FedrotError

Config = dict[str, Any]

SCALING = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})

NEUTRAL = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "lora_dropout", "runtime_config", "qalora_group_size"),
        # Which layers carry factors: compared through the keys of the state dict instead.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "megatron_core"),
        # Settings of an initialisation: without effect once `init_lora_weights` is accepted.
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)

MUST_AGREE: dict[str, Any] = {
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "target_parameters": None,
}

REFUSED: dict[str, str] = {
    "kasa_config": "KaSA puts a diagonal between B and A, so they cannot be rotated",
    "use_bdlora": "BD-LoRA keeps a factor block-diagonal, which a rotation would fill",
    "monteclora_config": "MonteCLoRA keeps sampler parameters in the basis of the factors",
    "arrow_config": "Arrow routes tokens between adapters instead of adding one",
    "velora_config": "VeLoRA keeps a projection of its own beside the factors",
    "use_qalora": "QA-LoRA is merged into a quantised base model of its own",
    "megatron_config": "Megatron stores the shards of a parallel layer",
    "ensure_weight_tying": "factors of tied layers would be rotated apart",
}

# Initialisations that subtract the first factors from the base weights. PEFT repeats the first
# two on loading, exactly, so adapters with the same rank and scaling do share one base model.
REPEATABLE_BASE_CHANGE = frozenset({"pissa", "olora"})
BASE_CHANGE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: Config, source: str) -> None:
    """Raise `FedrotError` unless this is a LoRA adapter whose `(B, A)` may be rotated."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise FedrotError(f"{source}: peft_type is {peft_type!r}, not 'LORA'")
    for field, reason in REFUSED.items():
        if config.get(field):
            raise FedrotError(f"{source}: {field} is set: {reason}")
    _check_init(config, source)
    known = SCALING | NEUTRAL | MUST_AGREE.keys() | REFUSED.keys()
    for field in sorted(config.keys() - known):
        if config[field] and config[field] != peft_default(field):
            raise FedrotError(
                f"{source}: the configuration sets {field}={config[field]!r}, "
                "a LoRA option that this version of fedrot does not know"
            )
    _check_scaling_fields(config, source)


def base_change(config: Config) -> str | None:
    """The initialisation that changed the base weights of this adapter, or None."""
    init = str(config.get("init_lora_weights", True)).lower()
    return init if init.startswith(BASE_CHANGE) else None


def rank_and_scaling(config: Config, target: str) -> tuple[int, float]:
    """Rank and scaling that PEFT gives to one target: `alpha / r`, or `alpha / sqrt(r)` (rsLoRA).

    `target` is the name of the module, or of the parameter, inside the base model. `rank_pattern`
    and `alpha_pattern` are matched by PEFT's own `get_pattern_key`.
    """
    rank = _matched(config.get("rank_pattern"), target, config.get("r", 8))
    return rank, alpha_of(config, target) / _denominator(config, rank)


def alpha_of(config: Config, target: str, field: str = "lora_alpha") -> float:
    """The alpha of one target; `field` is what the configuration calls the default."""
    return _matched(config.get("alpha_pattern"), target, config.get(field, 8))


def targeted_parameters(config: Config, module: str) -> tuple[str, ...]:
    """The parameters of a module that `target_parameters` may name, by their names in the model.

    Which of them a pair of factors belongs to is in the model alone: a state dict names the module,
    once for each of its parameters.
    """
    names = []
    for target in sorted(config.get("target_parameters") or ()):
        inside, _, parameter = target.rpartition(".")
        if f".{module}".endswith(f".{inside}"):
            names.append(f"{module}.{parameter}")
    return tuple(names)


def with_ranks(config: Config, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> Config:
    """A copy of `config` that gives every target the wanted rank and scaling.

    `lora_alpha` follows the rank, so it may become fractional. The commonest rank and alpha
    become the defaults, the others anchored entries of `rank_pattern` and `alpha_pattern`.
    """
    # PEFT repeats an orthogonal initialisation on loading, and refuses it for an odd rank.
    orthogonal = config.get("init_lora_weights") == "orthogonal"
    alphas = {m: _whole(scalings[m] * _denominator(config, ranks[m])) for m in ranks}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        **config,
        **({"init_lora_weights": True} if orthogonal else {}),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(m): v for m, v in ranks.items() if v != rank},
        "alpha_pattern": {_anchored(m): v for m, v in alphas.items() if v != alpha},
    }


def _check_init(config: Config, source: str) -> None:
    init = base_change(config)
    if init is not None and init not in REPEATABLE_BASE_CHANGE:
        raise FedrotError(
            f"{source}: init_lora_weights={init!r} changed the base weights in a way that loading "
            "does not repeat, so the adapters do not share a base model; where PEFT can, convert "
            "them with save_pretrained(..., path_initial_model_for_weight_conversion=...) first"
        )


def _check_scaling_fields(config: Config, source: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise FedrotError(f"{source}: {field} must be an object, got {config[field]!r}")
        for pattern in config.get(field) or {}:
            try:  # as PEFT will match it
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise FedrotError(
                    f"{source}: {field}: {pattern!r} is not a regular expression ({error.msg})"
                ) from error
    ranks = {"r": config.get("r", 8), **(config.get("rank_pattern") or {})}
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FedrotError(f"{source}: rank {name!r} must be a positive integer, got {value!r}")
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    for name, value in alphas.items():
        if not isinstance(value, int | float) or not (0 < value < math.inf):
            raise FedrotError(f"{source}: alpha {name!r} must be a positive number, got {value!r}")


def peft_default(field: str, peft_type: str = "LORA") -> Any:
    """The default that the installed PEFT gives to a field; None where it does not know it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    for known in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]):
        if known.name == field and known.default is not dataclasses.MISSING:
            return known.default
    return None


def _matched(pattern: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), target), default)


def _denominator(config: Config, rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _anchored(target: str) -> str:
    return "^" + re.escape(target)


def _whole(value: float) -> int | float:
    """8 instead of 8.0, and instead of the 7.999999999999999 that a square root leaves."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value
