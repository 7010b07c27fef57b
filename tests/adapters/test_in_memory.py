"""`fedrot.aggregate` on models and state dicts: the same values as on folders, put back by PEFT."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

import fedrot
from fedrot.errors import FedrotError
from fedrot.methods import FedExLoRA, FedRot, FlexLoRA, Robust

ALL = ["emb", "conv", "lin1", "lin2"]
KEY_A, KEY_B = (f"base_model.model.lin1.lora_{side}.weight" for side in "AB")


def pair(model: PeftModel):
    # Given its state dict, PEFT does not take the bias of lora_B for a shard.
    state = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return state, model.peft_config["default"]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


KINDS = {
    "all-layer-kinds": [{"target_modules": ALL}] * 3,
    "alpha": [{}, {"lora_alpha": 20}, {}],
    "rslora": [{"use_rslora": True}, {"lora_alpha": 5}, {}],
    "mixed-ranks": [{"r": 2}, {"r": 3, "lora_alpha": 5}, {}],
    "patterns": [
        {"rank_pattern": {"lin2": 3}, "alpha_pattern": {"lin1": 20}},
        {},
        {"rank_pattern": {"lin.": 6}},
    ],
    "dora": [{"use_dora": True}] * 3,
    "lora-bias": [{"lora_bias": True}, {"lora_bias": True, "lora_alpha": 3}, {"lora_bias": True}],
    "bias": [{"bias": "all", "modules_to_save": ["head"]}] * 3,
    "tokens": [{"trainable_token_indices": {"emb": [1, 4]}}] * 3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_state_dicts_give_what_their_folders_give(tools, tmp_path, kind):
    models = [tools.adapted(seed, **kw) for seed, kw in enumerate(KINDS[kind])]
    folders = [tools.saved(model, tmp_path / str(i)) for i, model in enumerate(models)]
    on_disk = fedrot.aggregate(folders[:2], folders[2], weights=[3, 1])
    on_disk.save(tmp_path / "on-disk")
    expected = tools.tensors(tmp_path / "on-disk")

    in_memory = fedrot.aggregate(models[:2], models[2], weights=[3, 1])
    assert equal(in_memory.tensors, expected)
    in_memory.save(tmp_path / "in-memory")
    assert equal(tools.tensors(tmp_path / "in-memory"), expected)
    out = tools.output_of(tmp_path / "in-memory")
    torch.testing.assert_close(out, tools.output_of(tmp_path / "on-disk"), rtol=0, atol=0)

    pairs = [pair(model) for model in models]
    assert equal(fedrot.aggregate(pairs[:2], pairs[2], weights=[3, 1]).tensors, expected)
    mixed = fedrot.aggregate([folders[0], pairs[1]], models[2], weights=[3, 1])
    assert equal(mixed.tensors, expected)

    # Put back into a model, it is the model that loading the folder gives.
    set_peft_model_state_dict(models[2], in_memory.tensors)
    torch.testing.assert_close(tools.says(models[2]), out, rtol=0, atol=1e-6)


def test_values_against_the_hand_computation_in_bf16(tools):
    models = [tools.adapted(seed, torch.bfloat16, lora_alpha=4 * (seed + 1)) for seed in range(3)]
    before = [pair(model)[0] for model in models]
    states = [{k: v.double() for k, v in state.items()} for state in before]
    merged = fedrot.aggregate(models[:2], models[2], weights=[1, 3])
    for module in ("lin1", "lin2"):
        keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        roots = [(alpha / 12) ** 0.5 for alpha in (4, 8, 12)]
        factors = [tuple(s[k] * root for k in keys) for s, root in zip(states, roots, strict=True)]
        exact = tools.hand_merge(factors[:2], factors[2], [0.25, 0.75])
        for key, value in zip(keys, exact, strict=True):
            assert merged.tensors[key].dtype == torch.bfloat16
            limit = value.abs() * 2**-8 + 1e-5  # one rounding
            assert ((merged.tensors[key].double() - value).abs() <= limit).all()
    # Inputs stay, and the result is not one of them.
    for model, state in zip(models, before, strict=True):
        assert equal(
            {k: v.double() for k, v in pair(model)[0].items()},
            {k: v.double() for k, v in state.items()},
        )
    memory = {t.data_ptr() for model in models for t in model.state_dict().values()}
    assert not memory & {t.data_ptr() for t in merged.tensors.values()}


def test_what_was_measured_stays_when_a_model_changes(tools):
    """It is measured when first asked for: by then the merge may be in the model."""
    models = [tools.adapted(seed, target_modules=ALL) for seed in (1, 2)]
    expected = fedrot.aggregate(models).misalignment.summary()
    merged = fedrot.aggregate(models)
    set_peft_model_state_dict(models[0], merged.tensors)
    assert merged.misalignment.summary() == expected


def test_several_adapters_of_one_model_become_a_new_one(tools):
    """Adapter `b` is `a` in another basis: the merge has to be `a`."""
    model = tools.adapted(1, target_modules=ALL)
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=8, target_modules=ALL))
    set_peft_model_state_dict(model, tools.in_other_bases(pair(model)[0], 5), adapter_name="b")
    expected = tools.says(model)
    names = ["default", "b"]

    merged = fedrot.aggregate([(model, name) for name in names])
    merged.add_to(model, "merged")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".merged" in n)
    model.set_adapter("merged")
    torch.testing.assert_close(tools.says(model), expected, rtol=0, atol=5e-5)

    # What add_weighted_adapter does with them: it never aligns. Weights of 1/4 because it takes
    # their root on each factor: then it is the mean of the factors.
    model.add_weighted_adapter(names, [0.25, 0.25], "linear", combination_type="linear")
    model.set_adapter("linear")
    assert (tools.says(model) - expected).abs().max() > 0.1

    with pytest.raises(FedrotError, match="already has an adapter 'merged'"):
        merged.add_to(model, "merged")


@pytest.mark.parametrize("name", ["client", "lin1", "lora_A", "m"])
def test_a_name_that_begins_another_one_or_is_a_part_of_the_model(tools, name):
    model = tools.adapted(1, target_modules=ALL)
    for other in ("client-a", "client-b"):
        model.add_adapter(other, LoraConfig(r=4, lora_alpha=8, target_modules=ALL))
    tools.randomised(model, 2)
    merged = fedrot.aggregate([(model, "client-a"), (model, "client-b")])
    merged.add_to(model, name)
    again = fedrot.aggregate([(model, name)], method=FedRot(0.0))
    assert equal(again.tensors, merged.tensors)


def test_a_layer_that_the_model_has_not_is_named(tools):
    merged = fedrot.aggregate([tools.adapted(1, target_modules=ALL)])
    merged.tensors.pop(KEY_A)
    with pytest.raises(FedrotError, match=r"has not the layers of the adapter: .*lin1\.lora_A"):
        merged.add_to(tools.adapted(2), "merged")


def test_the_active_adapter_is_meant_where_none_is_named(tools):
    model = tools.adapted(1)
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=8, target_modules=["lin1", "lin2"]))
    tools.randomised(model, 2)
    model.set_adapter("b")
    one = fedrot.aggregate([model]).tensors
    assert torch.equal(one[KEY_A], model.base_model.model.lin1.lora_A["b"].weight)
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(FedrotError, match=r"adapters\[0\]: adapters \['default', 'b'\] are active"):
        fedrot.aggregate([model])


def test_a_padded_result_fits_a_model_as_a_new_adapter(tools):
    small, large = tools.adapted(1, r=2, use_rslora=True), tools.adapted(2, r=5, lora_alpha=7)
    with pytest.raises(FedrotError, match=r"adapters\[0\] \('default'\): layer 'lin1' has rank 5"):
        fedrot.aggregate([large], small)
    merged = fedrot.aggregate([large], small, rank=5)
    assert isinstance(merged.lora_config, LoraConfig) and merged.lora_config.r == 5
    merged.add_to(small, "merged")
    small.set_adapter("merged")
    torch.testing.assert_close(tools.says(small), tools.says(large), rtol=0, atol=5e-5)


def test_the_result_is_the_reference_of_the_next_round(tools, tmp_path):
    models = [tools.adapted(seed) for seed in range(3)]
    first = fedrot.aggregate(models)
    first.save(tmp_path / "global")
    next_round = fedrot.aggregate(models, (first.tensors, first.config))
    assert equal(next_round.tensors, fedrot.aggregate(models, tmp_path / "global").tensors)
    assert not equal(next_round.tensors, first.tensors)


def test_another_method(tools):
    """FlexLoRA: the best approximation of rank 4 of the exact mean."""
    models = [tools.adapted(seed, lora_alpha=8 * (1 + seed)) for seed in range(3)]
    merged = fedrot.aggregate(models, method=FlexLoRA()).tensors
    states = [{k: v.double() for k, v in pair(model)[0].items()} for model in models]
    exact = sum((1 + i) * s[KEY_B] @ s[KEY_A] for i, s in enumerate(states)) / 3
    U, S, Vh = torch.linalg.svd(exact)
    best = U[:, :4] * S[:4] @ Vh[:4]
    result = merged[KEY_B].double() @ merged[KEY_A].double()
    torch.testing.assert_close(result, best, rtol=0, atol=1e-5)
    assert (exact - best).norm() > 0.1
    # Clients of any rank; the result has that of the reference.
    clients = [tools.adapted(seed, r=r, lora_alpha=r) for seed, r in enumerate((2, 4, 6))]
    merged = fedrot.aggregate(clients, method=FlexLoRA()).tensors
    states = [{k: v.double() for k, v in pair(model)[0].items()} for model in clients]
    U, S, Vh = torch.linalg.svd(sum(s[KEY_B] @ s[KEY_A] for s in states) / 3)
    result = merged[KEY_B].double() @ merged[KEY_A].double()
    assert merged[KEY_A].shape[0] == 2
    torch.testing.assert_close(result, U[:, :2] * S[:2] @ Vh[:2], rtol=0, atol=1e-5)
    with pytest.raises(FedrotError, match="method: FedEx-LoRA needs more than the adapters"):
        fedrot.aggregate(models, method=FedExLoRA())
    for method in (FedRot(1.0, lag=2), FedRot(1.0, "alternate")):
        with pytest.raises(FedrotError, match="alternate' are of rounds, and a merge is none, got"):
            fedrot.aggregate(models, method=method)


def test_misalignment_and_origin(tools, tmp_path):
    folder = tools.saved(tools.adapted(1), tmp_path / "a")
    merged = fedrot.aggregate([folder, tools.adapted(2)], weights=[1, 3], method=FedRot(0.5))
    summary = merged.misalignment.summary()
    assert 0 < summary["relative_aligned"] < 1
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    tools.saved(tools.adapted(5), folder)  # what was merged is not there any more
    merged.save(tmp_path / "m")
    origin = json.loads((tmp_path / "m" / "fedrot_provenance.json").read_text())
    assert origin["measured"] == summary
    assert origin["clients"][0]["path"] == str(folder)
    recorded = origin["clients"][0]["sha256"]
    assert set(recorded) == {"adapter_config.json", "adapter_model.safetensors"}
    assert recorded.items() <= files.items()
    assert origin["clients"][1] == {"given as": "adapters[1] ('default')", "weight": 0.75}
    assert origin["method"]["lam"] == 0.5
    with pytest.raises(FedrotError, match="exists"):
        merged.save(tmp_path / "m")
    with pytest.raises(FedrotError, match="would replace the input"):
        merged.save(folder, force=True)


def test_what_is_printed_holds_no_values(tools):
    models = [tools.adapted(seed) for seed in range(2)]
    merged = fedrot.aggregate(models, method=FedRot(0.5))
    assert repr(merged).startswith(f"Merged(LoRA: 2 adapters, {len(merged.tensors)} tensors, FedRo")
    layers, rank = len(merged.factors.A), next(iter(merged.factors.A.values())).shape[0]
    assert repr(merged.factors) == f"Factors({layers} layers of rank {rank})"
    adapter = f"Adapter(adapters[0] ('default'): LoRA, {len(merged.tensors)} tensors)"
    assert repr(merged.uploads) == f"Uploads(2 adapters, toward {adapter})"


def test_the_error_is_that_of_what_is_stored(tools):
    """At full rank nothing is lost but by rounding to bfloat16."""
    models = [tools.adapted(seed, torch.bfloat16) for seed in range(2)]
    merged = fedrot.aggregate(models, rank="auto", energy=1.0)
    square = 0.0
    states = [{k: v.double() for k, v in pair(model)[0].items()} for model in models]
    for key_A in (key for key in merged.tensors if "lora_A" in key):
        key_B = key_A.replace("lora_A", "lora_B")
        exact = sum(s[key_B] @ s[key_A] for s in states) / 2
        stored = merged.tensors[key_B].double() @ merged.tensors[key_A].double()
        square += float((2 * (exact - stored)).square().sum())  # alpha 8, rank 4
    found = merged.misalignment.summary()["error_aligned"]
    assert found == pytest.approx(square**0.5, rel=1e-3) and found > 1e-3


def test_angles_are_of_the_rotations_that_a_robust_rule_fits(tools):
    models = [tools.adapted(seed) for seed in range(3)]
    angles = {}
    for align in ("joint", "A", "B"):
        robust, plain = (
            fedrot.aggregate(models, method=method).misalignment.angles
            for method in (Robust(align=align), FedRot(1.0, align, proper=False))
        )
        assert torch.equal(robust, plain)
        angles[align] = float(robust.mean())
    assert len(set(angles.values())) == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_tied_embeddings_trained_whole(tools):
    """A GPT-2 whose output layer is its embedding, which each client has trained whole."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20, "n_positions": 8}

    def client(seed: int) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
        config.fan_in_fan_out = True  # GPT-2's Conv1D
        return tools.randomised(get_peft_model(GPT2LMHeadModel(GPT2Config(**size)), config), seed)

    models = [client(seed) for seed in (1, 2)]
    merged = fedrot.aggregate(models, weights=[1, 3])
    states = [get_peft_model_state_dict(m, save_embedding_layers=False) for m in models]
    whole = [key for key in merged.tensors if "lora_" not in key]
    assert sorted(key.rsplit(".", 2)[1] for key in whole) == ["lm_head", "wte"]
    for key in whole:
        mean = 0.25 * states[0][key] + 0.75 * states[1][key]
        torch.testing.assert_close(merged.tensors[key], mean)
    tokens = torch.arange(6)[None]
    set_peft_model_state_dict(models[0], merged.tensors)
    one = fedrot.aggregate([models[0]], models[1])
    set_peft_model_state_dict(models[1], one.tensors)
    with torch.no_grad():
        outs = [model.eval()(tokens).logits for model in models]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)


def meta(state):
    return {k: v.to("meta") for k, v in state.items()}


def with_nan(state):
    return {k: v * float("nan") if k == KEY_B else v for k, v in state.items()}


def test_wrong_inputs_are_named(tools):
    model, other = tools.adapted(1), tools.adapted(2, target_modules=["lin1"])
    state, config = pair(model)
    cases = [
        (([],), {}, FedrotError, "no adapters to merge"),
        ((model,), {}, TypeError, "adapters must be a list, .* got PeftModel"),
        (("client-a",), {}, TypeError, "adapters must be a list, .* got str"),
        (([model, 3],), {}, TypeError, r"adapters\[1\] must be a folder, a PeftModel, .* got int"),
        (([state],), {}, TypeError, r"adapters\[0\] must be .* got dict"),
        (([(state, "lora")],), {}, TypeError, "configuration must be a LoraConfig, got str"),
        (([(state, {})],), {}, FedrotError, r"adapters\[0\]: peft_type is None"),
        (([torch.nn.Linear(2, 2)],), {}, TypeError, "must be a PeftModel, got Linear"),
        (([(model, "b")],), {}, FedrotError, r"\('b'\): the model has no such .* only 'default'"),
        (([model, model],), {}, FedrotError, r"adapters\[1\] is given twice"),
        (([(model, "default"), (model, "default")],), {}, FedrotError, "is given twice"),
        (([model], 7), {}, TypeError, "reference must be"),
        (([other], model), {}, FedrotError, r"adapters\[0\] \('default'\): other layers than the"),
        (([model],), {"weights": [1, 2]}, FedrotError, "weights: 2 values for 1 adapters"),
        (([model],), {"weights": [-1]}, FedrotError, "weights must be finite, not negative"),
        (([model],), {"rank": 0}, FedrotError, "rank must be at least 1"),
        (([model],), {"method": "fedrot"}, TypeError, "method must be .* got 'fedrot'"),
        (([model],), {"method": FedRot}, TypeError, "method must be .* got <class"),
        (([(meta(state), config)],), {}, FedrotError, "has no values"),
        (([(with_nan(state), config)],), {}, FedrotError, f"'{KEY_B}' has non-finite values"),
        (([({"a": 1}, config)],), {}, TypeError, "'a' must be a tensor, got int"),
        (([(model.state_dict(), config)],), {}, FedrotError, "unknown key .*"),
        (
            ([({k: v for k, v in model.state_dict().items() if "lora" in k}, config)],),
            {},
            FedrotError,
            "lin1.lora_A.default.weight' .*get_peft_model_state_dict gives the keys without",
        ),
    ]
    for args, kwargs, kind, message in cases:
        with pytest.raises(kind, match=message):
            fedrot.aggregate(*args, **kwargs)


def test_an_injected_adapter_without_a_peft_model(tools):
    """Keys without PEFT's prefix, as `inject_adapter_in_model` and transformers make them."""
    models = [tools.adapted(seed) for seed in (1, 2)]
    config = models[0].peft_config["default"]
    bare = []
    for model in models:
        injected = inject_adapter_in_model(config, tools.base_model())
        prefix = "base_model.model."
        state = {k.removeprefix(prefix): v for k, v in pair(model)[0].items()}
        set_peft_model_state_dict(injected, state)
        bare.append((get_peft_model_state_dict(injected, save_embedding_layers=False), config))
    merged = fedrot.aggregate(bare).tensors
    expected = fedrot.aggregate(models).tensors
    assert equal({prefix + key: value for key, value in merged.items()}, expected)


def test_pissa_changes_the_base_so_it_is_saved_and_loaded(tools):
    config = {"init_lora_weights": "pissa"}
    a, b = tools.adapted(1, **config), tools.adapted(2, **config)
    merged = fedrot.aggregate([a, b])
    with pytest.raises(FedrotError, match="would change the base weights once more"):
        merged.add_to(a, "merged")
    a.add_adapter("b", LoraConfig(r=4, target_modules=["lin1"], **config))
    with pytest.raises(FedrotError, match="load each alone"):
        fedrot.aggregate([(a, "default"), (a, "b")])


def test_adding_to_a_model_of_other_layers_leaves_it_as_it_was(tools):
    """Without lin2 in the model, PEFT alone would add a part and say nothing."""
    net = tools.base_model()
    del net.lin2
    other = get_peft_model(net, LoraConfig(r=2, target_modules=["lin1"]))
    before = list(other.state_dict())
    with pytest.raises(FedrotError, match=r"has not the layers of the adapter: .*lin2\.lora_A"):
        fedrot.aggregate([tools.adapted(1)]).add_to(other, "merged")
    assert list(other.peft_config) == ["default"] and list(other.state_dict()) == before


def test_importing_fedrot_imports_neither_torch_nor_peft():
    code = (
        "import sys, fedrot; assert 'aggregate' in fedrot.__all__;"
        "print(sorted({'torch', 'peft', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="module 'fedrot' has no attribute 'nothing'"):
        fedrot.nothing  # noqa: B018
