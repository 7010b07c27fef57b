"""Ranks and scalings as PEFT resolves them; configurations that cannot be averaged."""

import dataclasses

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from fedrot.adapters.config import (
    MUST_AGREE,
    NEUTRAL,
    REFUSED,
    SCALING,
    check_config,
    rank_and_scaling,
    with_ranks,
)
from fedrot.errors import FedrotError

SOURCE = "client-a"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.deep = nn.ModuleDict({"q": nn.Linear(4, 4), "qq": nn.Linear(4, 4)})
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(12))


PATTERNS = [
    {},
    {"rank_pattern": {"^q": 2}},
    {"rank_pattern": {"deep.q": 2, "q": 3}, "alpha_pattern": {"q": 5}},
    {"rank_pattern": {r"layers\.(0|1)\.q": 2}, "alpha_pattern": {r"layers\.1.*": 1}},
    {"use_rslora": True, "rank_pattern": {"qq": 2}},
]


@pytest.mark.parametrize("kw", PATTERNS)
def test_rank_and_scaling_are_what_peft_gives_the_modules(kw):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "qq"], **kw)
    model = get_peft_model(Nested(), config).base_model.model
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            expected = (module.r["default"], module.scaling["default"])
            assert rank_and_scaling(config.to_dict(), name) == expected


def test_with_ranks_is_understood_by_peft():
    """Every module at its own rank and scaling, also where one name is the end of another."""
    names = ["deep.q", "q", "deep.qq", *(f"layers.{i}.q" for i in range(12))]
    ranks = {name: 1 + i % 3 for i, name in enumerate(names)} | {"q": 7}
    scalings = {name: 0.3 + i for i, name in enumerate(names)}
    for rslora in (False, True):
        raw = with_ranks({**PLAIN, "use_rslora": rslora}, ranks, scalings)
        config = LoraConfig(target_modules=["q", "qq"], **{k: v for k, v in raw.items()})
        model = get_peft_model(Nested(), config).base_model.model
        for name in names:
            module = model.get_submodule(name)
            assert module.r["default"] == ranks[name]
            assert module.scaling["default"] == pytest.approx(scalings[name], rel=1e-12)


def test_uniform_padding_leaves_no_patterns():
    padded = with_ranks({**PLAIN, "rank_pattern": {"q": 2}}, {"q": 8, "v": 8}, {"q": 2, "v": 2})
    assert padded == {**PLAIN, "r": 8, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}


def test_padding_an_orthogonal_adapter_to_an_odd_rank_still_loads():
    padded = with_ranks({**PLAIN, "init_lora_weights": "orthogonal"}, {"q": 5}, {"q": 2.0})
    model = get_peft_model(Nested(), LoraConfig(target_modules=["q"], **padded))
    assert model.base_model.model.q.scaling["default"] == 2.0


def test_every_lora_option_of_the_installed_peft_has_been_thought_about():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - (SCALING | NEUTRAL | MUST_AGREE.keys() | REFUSED.keys()) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config is set: KaSA"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"megatron_config": {"a": 1}}, "megatron_config is set"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is set"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changed the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"use_future_lora": True}, "use_future_lora=True, a LoRA option"),
        ({"r": 0}, "rank 'r' must be a positive integer, got 0"),
        ({"rank_pattern": {"q": 2.5}}, "rank 'q' must be a positive integer, got 2.5"),
        ({"lora_alpha": 0}, "alpha 'lora_alpha' must be a positive number, got 0"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern must be an object"),
        ({"rank_pattern": {"(q": 2}}, r"rank_pattern: '\(q' is not a regular expression \(missing"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(FedrotError, match=message) as caught:
        check_config({**PLAIN, **change}, SOURCE)
    assert str(caught.value).startswith("client-a: ")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "pissa", "olora"])
def test_accepted_initialisations(init):
    check_config({**PLAIN, "init_lora_weights": init, "use_future_lora": None}, SOURCE)
