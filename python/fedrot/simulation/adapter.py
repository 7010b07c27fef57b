"""The base model with its LoRA adapter (PEFT), and the adapter's factors in and out of it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from fedrot.config import Lora
from fedrot.factors import Factors
from fedrot.files import new_folder

ADAPTER = "default"
PREFIX = "base_model.model."


def adapt(model: nn.Module, lora: Lora, targets: list[str]) -> PeftModel:
    """A frozen model with a LoRA adapter on the linear layers whose names end in ``targets``."""
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
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
    """A fresh adapter as PEFT initialises it: ``A`` Kaiming-uniform, ``B`` zero."""
    A, B = {}, {}
    for module, (name_A, name_B) in parameter_names(model).items():
        A[module] = torch.empty_like(model.get_parameter(name_A), requires_grad=False)
        nn.init.kaiming_uniform_(A[module], a=math.sqrt(5), generator=generator)
        B[module] = torch.zeros_like(model.get_parameter(name_B), requires_grad=False)
    return Factors(A, B)


@torch.no_grad()
def set_factors(model: PeftModel, factors: Factors) -> PeftModel:
    """The model with these factors in its adapter (changed in place)."""
    for module, (name_A, name_B) in parameter_names(model).items():
        model.get_parameter(name_A).copy_(factors.A[module])
        model.get_parameter(name_B).copy_(factors.B[module])
    return model


def get_factors(model: PeftModel) -> Factors:
    """A copy of the factors in the model's adapter."""
    names = parameter_names(model)

    def copy(name: str) -> Tensor:
        return model.get_parameter(name).detach().clone()

    return Factors(
        {module: copy(a) for module, (a, _) in names.items()},
        {module: copy(b) for module, (_, b) in names.items()},
    )


def save_adapter(model: PeftModel, factors: Factors, folder: Path) -> None:
    """Write a PEFT folder that ``PeftModel.from_pretrained`` loads, whole or not at all."""
    set_factors(model, factors)
    with new_folder(folder) as fresh:
        model.save_pretrained(str(fresh), save_embedding_layers=False)


def load_adapter(model: PeftModel, folder: Path) -> Factors:
    """The factors in a folder that :func:`save_adapter` wrote for the same model."""
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return get_factors(model)
