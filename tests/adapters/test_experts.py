"""Mixtures of experts: LoRA on `target_parameters`, each expert in a basis of its own."""

import json
import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from typer.testing import CliRunner

import fedrot
from fedrot.adapters import read_adapter
from fedrot.cli import app
from fedrot.errors import FedrotError
from fedrot.methods import FedRot

# Before it, the experts of Mixtral and Qwen are modules, and LoRA on them is as on any other.
transformers = pytest.importorskip("transformers", minversion="5.0")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
    # PEFT compares patterns with modules only, but applies them to parameters as well.
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning"),
]

SIZE = {
    **{"vocab_size": 20, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16},
}
EXPERTS = 4
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODULE = "base_model.model.model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{MODULE}.base_layer", MODULE  # the order in which PEFT wraps them

BASES = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_local_experts=EXPERTS, **SIZE)
    ),
    "qwen3": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=6, **SIZE
        )
    ),
    # Stores its experts (E, in, out), the others (E, out, in).
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(num_local_experts=EXPERTS, head_dim=6, **SIZE)
    ),
}


def client(tools, seed: int, base: str = "mixtral", **kw) -> PeftModel:
    """An adapter on all experts and one attention projection."""
    torch.manual_seed(0)
    model = BASES[base]()
    kw = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **kw}
    config = LoraConfig(target_parameters=[*PARAMETERS], **kw)
    return tools.randomised(get_peft_model(model, config), seed, scale=0.3)


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12).reshape(2, 6)).logits


def state_of(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def experts_of(state: dict[str, Tensor], layer: str, rank: int = 3) -> list[tuple[Tensor, Tensor]]:
    """`(A_e, B_e)` as PEFT's ParamWrapper.get_delta_weight reads them."""
    A = state[f"{layer}.lora_A.weight"].double().reshape(EXPERTS, rank, -1)
    B = state[f"{layer}.lora_B.weight"].double()
    B = B.reshape(B.shape[0], rank, EXPERTS)
    return [(A[e], B[:, :, e]) for e in range(EXPERTS)]


def in_other_bases(state: dict[str, Tensor], tools, seed: int) -> dict[str, Tensor]:
    """Every expert of every layer in a random basis of its own; the rest as it is."""
    gen = torch.Generator().manual_seed(seed)
    state = dict(state)
    for layer in (GATE_UP, DOWN):
        turned = []
        for A, B in experts_of(state, layer):
            Q = tools.rotation(3, gen)
            turned.append((Q.T @ A, B @ Q))
        state[f"{layer}.lora_A.weight"] = torch.cat([A for A, _ in turned]).float()
        B = torch.stack([B for _, B in turned], 2)
        state[f"{layer}.lora_B.weight"] = B.flatten(1).float().contiguous()
    return state


@pytest.mark.parametrize("base", BASES)
def test_one_adapter_in_other_bases_stays_that_adapter(tools, base):
    a = client(tools, 1, base)
    b = client(tools, 1, base)
    set_peft_model_state_dict(b, in_other_bases(state_of(a), tools, 5))
    expected = logits(a)
    torch.testing.assert_close(logits(b), expected, rtol=0, atol=1e-5)

    for result, same in (
        (fedrot.aggregate([a, b]), True),
        (fedrot.aggregate([a, b], method=fedrot.methods.FedIT()), False),
    ):
        model = client(tools, 2, base)
        assert (logits(model) - expected).abs().max() > 0.05
        set_peft_model_state_dict(model, result.tensors)
        distance = (logits(model) - expected).abs().max()
        assert distance < 1e-5 if same else distance > 0.05


def test_each_expert_is_merged_by_itself(tools):
    models = [client(tools, seed, lora_alpha=6 * (seed + 1)) for seed in range(3)]
    merged = fedrot.aggregate(models[:2], models[2], weights=[1, 3])
    states = [state_of(model) for model in models]
    for layer in (GATE_UP, DOWN):
        per_client = [experts_of(state, layer) for state in states]
        found = experts_of(merged.tensors, layer)
        for e in range(EXPERTS):
            roots = [(alpha / 18) ** 0.5 for alpha in (6, 12, 18)]
            factors = [
                (A * root, B * root)
                for (A, B), root in zip([c[e] for c in per_client], roots, strict=True)
            ]
            expected = tools.hand_merge(factors[:2], factors[2], [0.25, 0.75])
            for value, exact in zip(found[e], expected, strict=True):
                torch.testing.assert_close(value, exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "kw",
    [
        {"lora_alpha": 20},
        {"use_rslora": True},
        {"r": 2, "lora_alpha": 7},
        {"rank_pattern": {".*experts.down_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    ],
)
def test_a_single_client_keeps_its_function_on_the_reference_scale(tools, kw):
    one, reference = client(tools, 1, **kw), client(tools, 2)
    assert (logits(one) - logits(reference)).abs().max() > 0.05
    merged = fedrot.aggregate([one], reference)
    merged.add_to(reference, "merged")
    reference.set_adapter("merged")
    torch.testing.assert_close(logits(reference), logits(one), rtol=0, atol=1e-5)


def test_padding_keeps_every_expert(tools):
    patterns = {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    small, large = client(tools, 1, **patterns), client(tools, 2, r=4, lora_alpha=10)
    with pytest.raises(FedrotError, match=r"has rank 4, the reference only"):
        fedrot.aggregate([large], small)
    expected = logits(small), logits(large)
    for source, result in zip((small, large), expected, strict=True):
        model = client(tools, 1, **patterns)
        merged = fedrot.aggregate([source], model, rank=4)
        merged.add_to(model, "merged")
        model.set_adapter("merged")
        torch.testing.assert_close(logits(model), result, rtol=0, atol=1e-5)


def test_folders(tools, tmp_path):
    """Without a pattern a folder says enough; PEFT loads the result."""
    a, b = client(tools, 1), client(tools, 2)
    for name, model in (("a", a), ("b", b)):
        model.save_pretrained(tmp_path / name)
    result = CliRunner().invoke(
        app, ["aggregate", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "m")]
    )
    assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BASES["mixtral"](), str(tmp_path / "m"))
    in_memory = fedrot.aggregate([a, b])
    assert all(torch.equal(v, in_memory.tensors[k]) for k, v in state_of(loaded).items())
    set_peft_model_state_dict(b, in_memory.tensors)
    torch.testing.assert_close(logits(loaded), logits(b), rtol=0, atol=1e-6)

    shown = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "a"), str(tmp_path / "b")], env={"COLUMNS": "120"}
    )
    assert shown.exit_code == 0, shown.output
    row = next(line for line in shown.stdout.splitlines() if "mlp.experts " in line)
    assert row.split()[1:] == ["12x8", "12x12", "3", "4", "2", "float32"]
    # One line a layer, whatever the number of experts.
    assert len(re.findall(r"mlp\.experts", shown.stdout)) == 2 * 2


def test_measure_takes_the_experts_of_a_layer_together(tools):
    models = [client(tools, seed) for seed in (1, 2)]
    measured = fedrot.aggregate(models).misalignment
    name = DOWN.removeprefix("base_model.model.")
    states = [experts_of(state_of(model), DOWN) for model in models]
    mean = [sum(2 * s[e][1] @ s[e][0] for s in states) / 2 for e in range(EXPERTS)]
    assert measured.norm[name] == pytest.approx(float(torch.stack(mean).norm()), rel=1e-5)
    beyond = [torch.linalg.svdvals(m)[3:] for m in mean]  # the rank is 3
    assert measured.bound[name] == pytest.approx(float(torch.cat(beyond).norm()), rel=1e-5)
    assert measured.angles.shape == (2, 3)
    assert measured.angles[0].max() < 0.2 < 5 < measured.angles[1].min()
    assert measured.lam is None
    # The mean of its experts' `lam`.
    merged = fedrot.aggregate(models, method=FedRot("auto"))
    uploads, found = merged.uploads, merged.misalignment.by_layer()[name]["lam"]
    each = FedRot("auto").aggregate_with_lam(uploads.clients, uploads.reference)[1][:, 0].tolist()
    of = dict(zip(uploads.reference.A, each, strict=True))
    own = [of[pair] for pair in uploads.target.keys.layers[name].pairs]
    assert found == pytest.approx(sum(own) / EXPERTS) and len({*own}) > 1


def test_what_only_the_model_says(tools, tmp_path):
    """With ranks by pattern, a state dict does not say which parameter is which."""
    a = client(tools, 1, rank_pattern={"down_proj": 2})
    a.save_pretrained(tmp_path / "a")
    with pytest.raises(FedrotError, match=r"adapts one of .*down_proj, .*gate_up_proj.* the model"):
        read_adapter(tmp_path / "a")
    assert fedrot.aggregate([a]).tensors.keys() == state_of(a).keys()
    b = client(tools, 2)
    b.save_pretrained(tmp_path / "b")
    file = tmp_path / "b" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_parameters": ["gate_up_proj", "down_proj"]}))
    with pytest.raises(FedrotError, match="'gate_up_proj' names no module"):
        read_adapter(tmp_path / "b")


def test_experts_that_do_not_fit(tools, tmp_path):
    a = client(tools, 1)
    torch.manual_seed(0)
    other = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=2, **SIZE))
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=[*PARAMETERS])
    b = get_peft_model(other, config)
    with pytest.raises(FedrotError, match=r"layer '.*experts' has 2 experts, the reference 4"):
        fedrot.aggregate([b], a)
    torch.manual_seed(0)
    one = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=PARAMETERS[1:])
    c = get_peft_model(BASES["mixtral"](), one)
    with pytest.raises(FedrotError, match=r"target_parameters is \['mlp.experts.down_proj'\]"):
        fedrot.aggregate([c], a)
    state = state_of(a)
    state[f"{DOWN}.lora_A.weight"] = state[f"{DOWN}.lora_A.weight"][:-1]
    with pytest.raises(FedrotError, match=r"has A of shape \(11, 8\), .* rank 3"):
        fedrot.aggregate([(state, a.peft_config["default"])])
