"""The base model with its LoRA adapter (PEFT), and the adapter's factors in and out of it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedrot.adapters.layers import PREFIX
from fedrot.config import Lora
from fedrot.errors import FedrotError
from fedrot.factors import Factors, padded
from fedrot.files import new_folder

ADAPTER = "default"


def adapt(model: nn.Module, lora: Lora, targets: list[str]) -> PeftModel:
    """A frozen model with a LoRA adapter on the linear layers whose names end in ``targets``."""
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=lora.dropout
    )
    with warnings.catch_warnings():
        # PEFT asks transformers 5.2 for an attribute that it has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config).eval()


def parameter_names(model: PeftModel) -> dict[str, tuple[str, str]]:
    """Per adapted module (by its name in the base model) the names of its A and B parameters."""
    names = {}
    for parameter, _ in model.named_parameters():
        module, found, _ = parameter.partition(f".lora_A.{ADAPTER}.weight")
        if found:
            other = f"{module}.lora_B.{ADAPTER}.weight"
            names[module.removeprefix(PREFIX)] = (parameter, other)
    return names


def draw_factors(model: PeftModel, generator: torch.Generator) -> Factors:
    """A fresh adapter as PEFT initialises it: ``A`` Kaiming-uniform, ``B`` zero; float32, CPU."""
    A, B = {}, {}
    for module, (name_A, name_B) in parameter_names(model).items():
        A[module] = torch.empty(model.get_parameter(name_A).shape)
        nn.init.kaiming_uniform_(A[module], a=math.sqrt(5), generator=generator)
        B[module] = torch.zeros(model.get_parameter(name_B).shape)
    return Factors(A, B)


@torch.no_grad()
def set_factors(model: PeftModel, factors: Factors) -> PeftModel:
    """The model with these factors in its adapter (changed in place), padded to its rank."""
    for module, (name_A, name_B) in parameter_names(model).items():
        parameter = model.get_parameter(name_A)
        whole = padded(Factors({"": factors.A[module]}, {"": factors.B[module]}), len(parameter))
        parameter.copy_(whole.A[""])
        model.get_parameter(name_B).copy_(whole.B[""])
    return model


def get_factors(model: PeftModel) -> Factors:
    """A copy of the factors in the model's adapter, on the CPU."""
    names = parameter_names(model)

    def copy(name: str) -> Tensor:
        return model.get_parameter(name).detach().to("cpu", copy=True)

    return Factors(
        {module: copy(a) for module, (a, _) in names.items()},
        {module: copy(b) for module, (_, b) in names.items()},
    )


def get_head(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the base model's parameters outside its backbone (transformers'
    ``base_model_prefix``), by name: ``classifier.weight`` and the like; float32, on the CPU.

    Raises:
        FedrotError: there is none that is not the backbone's too, or one of another layer than a
            linear one.
    """
    base = model.get_base_model()
    backbone = f"{base.base_model_prefix}."
    names = {id(p): name for name, p in base.named_parameters() if not name.startswith(backbone)}
    shared = {
        id(p)
        for name, p in base.named_parameters(remove_duplicate=False)
        if name.startswith(backbone)
    }
    own = [name for key, name in names.items() if key not in shared]
    if not own:
        raise FedrotError(
            "local.head=true: this model's head has no parameters of its own (its output layer is "
            "tied to the embeddings); it must be false"
        )
    for name in own:
        layer, _, _ = name.rpartition(".")
        module = base.get_submodule(layer)
        if not isinstance(module, nn.Linear) or f"{layer}.weight" not in own:
            raise FedrotError(
                f"local.head=true: {name} of this model's head belongs to {type(module).__name__}, "
                "and only linear layers with weights of their own can be trained"
            )
    return {
        name: base.get_parameter(name).detach().to("cpu", torch.float32, copy=True) for name in own
    }


@torch.no_grad()
def set_head(model: PeftModel, head: Mapping[str, Tensor]) -> None:
    for name, value in head.items():
        model.get_base_model().get_parameter(name).copy_(value)


class FrozenWeights:
    """The frozen weights under the adapter, with what a method folds into them.

    The pristine weights of the modules concerned are copied the first time, so nothing is ever
    subtracted again and rounding does not add up.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.pristine: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, merged: Mapping[str, Tensor]) -> None:
        """``W = W_0 + scaling * merged`` for these modules, ``W_0`` for all others."""
        for module in {**self.pristine, **merged}:
            weight, W_0 = self._weight(module), self.pristine.get(module)
            if W_0 is None:
                W_0 = self.pristine[module] = weight.detach().clone()
            if module in merged:
                W_0 = W_0 + self.scaled(module, merged[module]).to(W_0.device)
            weight.copy_(W_0)

    def scaled(self, module: str, update: Tensor) -> Tensor:
        """An update on the scale of ``B A`` as a change of the stored weight."""
        layer = self._layer(module)
        update = update * layer.scaling[ADAPTER]
        return update.T if layer.fan_in_fan_out else update

    def _weight(self, module: str) -> Tensor:
        return self._layer(module).get_base_layer().weight

    def _layer(self, module: str) -> Any:
        return self.model.get_submodule(PREFIX + module)


def save_adapter(
    model: PeftModel, factors: Factors, folder: Path, head: Mapping[str, Tensor] | None = None
) -> None:
    """Write a PEFT folder that ``PeftModel.from_pretrained`` loads, whole or not at all.

    ``head``: trained parameters of the base model, stored as PEFT's ``modules_to_save``.
    """
    set_factors(model, factors)
    with new_folder(folder) as fresh:
        model.save_pretrained(str(fresh), save_embedding_layers=False)
        if head:
            _add_head(fresh, head)


def _add_head(folder: Path, head: Mapping[str, Tensor]) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    tensors.update({PREFIX + name: value.contiguous() for name, value in head.items()})
    save_file(tensors, weights, metadata={"format": "pt"})
    options = json.loads(config.read_text(encoding="utf-8"))
    options["modules_to_save"] = sorted({name.partition(".")[0] for name in head})
    config.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PeftModel, folder: Path) -> Factors:
    """The factors in a folder that :func:`save_adapter` wrote for the same model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    lora = {name: value for name, value in tensors.items() if ".lora_" in name}
    set_peft_model_state_dict(model, lora)
    return get_factors(model)


def load_head(folder: Path) -> dict[str, Tensor]:
    """The head in such a folder, empty where none was trained."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {n.removeprefix(PREFIX): t for n, t in tensors.items() if ".lora_" not in n}
