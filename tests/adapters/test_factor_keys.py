"""Layers from keys alone, without a configuration."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from fedrot.adapters.layers import factor_keys


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(6, 3, 1))
        self.head = nn.Linear(3, 2)


@pytest.fixture(scope="module")
def model():
    targets = ["embed", "mix.0", "mix.1"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["head"], use_dora=False)
    return get_peft_model(Model(), config)


def test_names_of_a_saved_state_dict(model):
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = factor_keys(state)
    assert found == {
        "embed": (
            "base_model.model.embed.lora_embedding_A",
            "base_model.model.embed.lora_embedding_B",
        ),
        "mix.0": ("base_model.model.mix.0.lora_A.weight", "base_model.model.mix.0.lora_B.weight"),
        "mix.1": ("base_model.model.mix.1.lora_A.weight", "base_model.model.mix.1.lora_B.weight"),
    }
    for A, B in found.values():
        assert state[A].shape[0] == state[B].shape[1] == 2


def test_names_of_parameters_are_the_same_layers(model):
    """Embedding layers hold a second, unused pair under the name of linear ones: none of theirs."""
    parameters = dict(model.named_parameters())
    found = factor_keys(parameters)
    assert list(found) == ["embed", "mix.0", "mix.1"]
    assert found["embed"] == tuple(
        f"base_model.model.embed.lora_embedding_{side}.default" for side in "AB"
    )
    assert found["mix.0"][1] == "base_model.model.mix.0.lora_B.default.weight"


def test_adapters_of_one_model_stay_apart():
    names = [f"q.lora_{side}.{adapter}.weight" for side in "AB" for adapter in ("one", "two")]
    assert list(factor_keys(names)) == ["q (one)", "q (two)"]


def test_what_is_no_factor():
    bias, magnitude = "q.lora_B{}.bias", "q.lora_magnitude_vector{}"
    others = [key.format(name) for key in (bias, magnitude) for name in ("", ".default")]
    assert factor_keys([*others, "q.lora_magnitude_vector.default.weight", "q.weight"]) == {}


def test_parts_between_the_factors():
    with pytest.raises(ValueError, match=r"'q\.lora_E' may forbid to rotate"):
        factor_keys(["q.lora_A.weight", "q.lora_B.weight", "q.lora_E"])


@pytest.mark.parametrize("side, other", ["AB", "BA"])
def test_half_a_pair(side, other):
    with pytest.raises(ValueError, match=f"'q.lora_{side}.weight' has no factor {other}"):
        factor_keys([f"q.lora_{side}.weight"])
