"""Where an adapter can come from: a folder, a model in memory, a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from fedrot.adapters.adapter import Adapter, checked
from fedrot.adapters.checkpoint import is_checkpoint, read_checkpoint
from fedrot.adapters.config import Config, base_change
from fedrot.adapters.folder import CONFIG, read_adapter
from fedrot.adapters.layers import EMBEDDING_NAMES, PREFIX
from fedrot.errors import FedrotError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    Source: TypeAlias = (
        str
        | Path
        | PeftModel
        | tuple[PeftModel, str]
        | tuple[Mapping[str, Tensor], PeftConfig | Mapping[str, Any] | None]
    )


def read(source: Source, name: str) -> Adapter:
    """The adapter behind a source, checked. `name` is what errors call one that has no folder.

    Tensors are copied to the CPU where they are elsewhere, else shared.

    Raises:
        FedrotError: as `checked`, or a model has not the adapter.
        TypeError: the source is nothing of the kind.
    """
    if isinstance(source, str | Path):
        return read_folder(Path(source))
    if isinstance(source, nn.Module):
        return _from_model(source, None, name)
    if isinstance(source, tuple) and len(source) == 2:
        first, second = source
        if isinstance(first, nn.Module) and isinstance(second, str):
            return _from_model(first, second, name)
        if isinstance(first, Mapping):
            config = None if second is None else _raw(second, name)
            return checked(name, config, _on_cpu(first, name))
    raise TypeError(
        f"{name} must be a folder, a PeftModel, (PeftModel, adapter name) or "
        f"(state dict, PeftConfig), got {_kind(source)}"
    )


def read_folder(path: Path) -> Adapter:
    """A PEFT folder, or where there is no `adapter_config.json`, the weights of a model."""
    if is_checkpoint(path) and not (path / CONFIG).is_file():
        return read_checkpoint(path)
    return read_adapter(path)


def check_distinct(sources: Sequence[Source]) -> None:
    """Raise `FedrotError` where one adapter is given twice."""
    seen = set()
    for index, source in enumerate(sources):
        if (key := _identity(source)) in seen:
            what = str(source) if isinstance(source, str | Path) else f"adapters[{index}]"
            raise FedrotError(f"{what} is given twice; use weights to count it double")
        seen.add(key)


def _identity(source: Any) -> Any:
    if isinstance(source, str | Path):
        return Path(source).resolve()
    if isinstance(source, tuple) and len(source) == 2:
        return id(source[0]), source[1] if isinstance(source[1], str) else None
    return id(source)


def _from_model(model: Any, adapter: str | None, name: str) -> Adapter:
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{name} must be a PeftModel, got {_kind(model)}; of another model give "
            "(peft.get_peft_model_state_dict(model), config)"
        )
    if adapter is None:
        adapter = _only_active(model, name)
    name = f"{name} ({adapter!r})"
    if adapter not in model.peft_config:
        known = ", ".join(repr(known) for known in model.peft_config)
        raise FedrotError(f"{name}: the model has no such adapter, only {known}")
    config = _raw(model.peft_config[adapter], name)
    if base_change(config) and len(model.peft_config) > 1:
        raise FedrotError(
            f"{name}: init_lora_weights={config['init_lora_weights']!r} changes the base weights "
            "for each adapter of a model, so with several no two have the same; load each alone"
        )
    # As PEFT saves them; left to itself it may ask the hub whether a vocabulary was resized, and
    # takes the bias of a lora_B for a shard.
    embeddings = any(
        name.rsplit(".", 1)[-1] in EMBEDDING_NAMES and adapter in _factors_of(module)
        for name, module in model.named_modules()
    )
    tensors = get_peft_model_state_dict(
        model, model.state_dict(), adapter, save_embedding_layers=embeddings
    )
    parameters = {
        path.removeprefix(PREFIX): f"{_inside(path)}.{module.parameter_name}"
        for path, module in model.named_modules()
        if hasattr(module, "parameter_name") and adapter in _factors_of(module)
    }
    return checked(name, config, _on_cpu(tensors, name), parameters=parameters)


def _only_active(model: PeftModel, name: str) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise FedrotError(f"{name}: adapters {active} are active; give (model, name) for one")
    return active[0]


def _factors_of(module: nn.Module) -> list[str]:
    """The adapters that have factors in this very module."""
    found: list[str] = []
    for part in ("lora_A", "lora_embedding_A"):
        if isinstance(factors := getattr(module, part, None), nn.ModuleDict | nn.ParameterDict):
            found += factors.keys()
    return found


def _inside(path: str) -> str:
    """The name of a wrapped module inside the base model."""
    return path.removeprefix(PREFIX).split(".base_layer", 1)[0]


def _raw(config: Any, name: str) -> Config:
    """A configuration as `adapter_config.json` holds it."""
    from peft import PeftConfig

    if isinstance(config, PeftConfig):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"{name}: the configuration must be a LoraConfig, got {_kind(config)}")
    return {key: _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _on_cpu(tensors: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key!r} must be a tensor, got {_kind(tensor)}")
        if tensor.is_meta:
            raise FedrotError(f"{name}: {key!r} has no values (it is on the meta device)")
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def _kind(value: Any) -> str:
    return type(value).__name__
