"""The table of docs/adapters.md, "Other adapters", row by row.

A client that is the reference, transformed by the invariance of its kind, is the same function;
with the reference it is merged to the reference again, which the plain average is not.
"""

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import fedrot
from fedrot.errors import FedrotError
from fedrot.methods import FedIT, FedRot

TARGETS = ["q_proj", "down_proj"]
KEY = "prompt_embeddings"
LAYERS, HEADS, WIDTH, TOKENS = 2, 2, 4, 5  # layers, key heads, entries of a head, virtual tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT
]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": HEADS}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2))


def says(model) -> torch.Tensor:
    tokens = torch.arange(18).view(2, 9) % 17
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def adapted(tools, config, seed: int):
    return tools.randomised(get_peft_model(llama(), config), seed)


def tensors(model) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def like(model, state):
    """The same adapter in a model of its own, with other values."""
    other = get_peft_model(llama(), model.peft_config["default"])
    set_peft_model_state_dict(other, state)
    return other


def assert_states(ours, theirs, atol=0.0) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=atol)


def assert_recovered(reference, client, atol=2e-6, same=2e-4):
    """One function, merged to itself; and the plain average is another one."""
    expected = says(reference)
    torch.testing.assert_close(says(client), expected, rtol=0, atol=same)
    merged = fedrot.aggregate([client, reference], reference, weights=[1, 1])
    assert_states(merged.tensors, tensors(reference), atol)
    plain = like(reference, fedrot.aggregate([client, reference], method=FedIT()).tensors)
    assert (says(plain) - expected).abs().max() > 0.05
    return merged


def test_lora(tools):
    reference = adapted(tools, LoraConfig(r=4, target_modules=TARGETS), 1)
    client = like(reference, tools.in_other_bases(tensors(reference), 5))
    merged = assert_recovered(reference, client)
    assert merged.distances is None


def test_lora_plus_trains_lora_and_keeps_its_invariance(tools):
    """Two learning rates, one for each factor, turn with the basis: so the adapter trained in
    another basis is the one trained in the first, in that basis."""

    def trained(state):
        model = like(start, state)
        opt = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=8)
        tokens = torch.arange(18).view(2, 9) % 17
        for _ in range(3):
            opt.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()
        return model

    start = adapted(tools, LoraConfig(r=4, target_modules=TARGETS), 1)
    one = trained(tensors(start))
    other = trained(tools.in_other_bases(tensors(start), 5))
    assert (says(one) - says(start)).abs().max() > 0.1
    assert one.peft_config["default"].peft_type == "LORA"
    assert_recovered(one, other, atol=1e-4, same=1e-3)


def test_dora_averages_magnitudes_beside_aligned_factors(tools):
    reference = adapted(tools, LoraConfig(r=4, target_modules=TARGETS, use_dora=True), 1)
    state = tools.in_other_bases(tensors(reference), 5)
    torch.testing.assert_close(says(like(reference, state)), says(reference), rtol=0, atol=2e-4)

    magnitudes = [key for key in state if key.endswith("lora_magnitude_vector")]
    gen = torch.Generator().manual_seed(2)
    for key in magnitudes:
        state[key] = state[key] + torch.rand(state[key].shape, generator=gen)
    client = like(reference, state)
    merged = fedrot.aggregate([client, reference], reference)
    expected = tensors(reference)
    for key in magnitudes:
        expected[key] = (expected[key] + state[key]) / 2
    assert len(magnitudes) == 4
    assert_states(merged.tensors, expected, 2e-6)
    assert "averaging the magnitude vectors is an approximation" in merged.notes[0]

    # The magnitudes are the norms of the rows of the weight, so those of the result are their
    # mean. The mean of weights that point elsewhere is shorter.
    states = [tensors(adapted(tools, reference.peft_config["default"], seed)) for seed in (1, 3)]
    for state in states:
        state.update({key: state[key].abs() for key in magnitudes})
    one, two = (like(reference, state) for state in states)
    both = like(reference, fedrot.aggregate([one, two]).tensors)
    weights = [m.merge_and_unload().model.layers[0].self_attn.q_proj.weight for m in (one, two)]
    result = both.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    mean_norm = sum(weight.norm(dim=1) for weight in weights) / 2
    torch.testing.assert_close(result.norm(dim=1), mean_norm, rtol=1e-4, atol=1e-4)
    assert ((sum(weights) / 2).norm(dim=1) < 0.95 * mean_norm).all()


def test_loha_aligns_both_products_their_order_and_their_sign(tools):
    reference = adapted(tools, LoHaConfig(r=4, target_modules=TARGETS), 1)
    state = tensors(reference)
    layers = sorted({key.rpartition(".")[0] for key in state})
    assert len(layers) == 4
    gen = torch.Generator().manual_seed(4)
    for place, layer in enumerate(layers):
        pairs = [[state[f"{layer}.hada_w{n}_{side}"] for side in "ab"] for n in "12"]
        turned = []
        for w_a, w_b in pairs:
            R = tools.rotation(4, gen).float()
            sign = -1 if place % 2 else 1
            turned.append((sign * w_a @ R, R.T @ w_b))
        for n, (w_a, w_b) in zip("12" if place < 2 else "21", turned, strict=True):
            state[f"{layer}.hada_w{n}_a"], state[f"{layer}.hada_w{n}_b"] = w_a, w_b
    client = like(reference, state)
    merged = assert_recovered(reference, client)
    assert merged.distances["distance_plain"] > 5 > 1e-4 > merged.distances["distance_aligned"]

    # Another alpha: the four factors share its effect.
    state = {key: value / 16**0.25 for key, value in state.items()}
    config = LoHaConfig(r=4, alpha=16 * 8, target_modules=TARGETS)
    larger = get_peft_model(llama(), config)
    set_peft_model_state_dict(larger, state)
    assert_recovered(reference, larger)

    # Without that it is what LoRA's alignment does to each product, by hand.
    other = adapted(tools, LoHaConfig(r=4, target_modules=TARGETS), 1)
    near = {
        key: value + 0.1 * torch.randn(value.shape, generator=gen)
        for key, value in tensors(other).items()
    }
    result = fedrot.aggregate([like(other, near), like(other, state)], other, weights=[3, 1])
    layer = layers[0]
    for n in "12":
        keys = [f"{layer}.hada_w{n}_{side}" for side in "ba"]
        factors = [tuple(s[key].double() for key in keys) for s in (near, state, tensors(other))]
        exact = tools.hand_merge(factors[:2], factors[2], [0.75, 0.25])
        for key, value in zip(keys, exact, strict=True):
            torch.testing.assert_close(result.tensors[key].double(), value, rtol=0, atol=1e-5)


def test_vera_aligns_the_sign_of_both_vectors(tools):
    reference = adapted(tools, VeraConfig(r=6, target_modules=TARGETS), 1)
    state = tensors(reference)
    layers = [key.rpartition(".")[0] for key in state if key.endswith("lambda_b")]
    for layer in layers[::2]:
        for vector in "bd":
            state[f"{layer}.vera_lambda_{vector}"] *= -1
    client = like(reference, state)
    assert_recovered(reference, client, atol=0.0)
    plain = fedrot.aggregate([client, reference], method=FedRot(0.0)).tensors
    assert (plain[f"{layers[0]}.vera_lambda_b"] == 0).all()

    key = adapted(tools, VeraConfig(r=6, target_modules=TARGETS, projection_prng_key=3), 1)
    with pytest.raises(FedrotError, match=r"projection_prng_key is 3, the reference .* has 0"):
        fedrot.aggregate([reference, key])
    projected = {**state, "base_model.vera_A": state["base_model.vera_A"] + 1}
    config = reference.peft_config["default"]
    with pytest.raises(FedrotError, match=r"'base_model.vera_A' is frozen and has to be the same"):
        fedrot.aggregate([reference, (projected, config)])


def test_ia3_averages_vectors_which_averages_weights(tools):
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    models = [adapted(tools, config, seed) for seed in (1, 2)]
    states = [tensors(model) for model in models]
    merged = fedrot.aggregate(models, weights=[3, 1]).tensors
    assert len(merged) == 4
    mean = {key: 0.75 * states[0][key] + 0.25 * states[1][key] for key in merged}
    assert_states(merged, mean, 1e-6)
    result = like(models[0], merged).merge_and_unload().state_dict()
    weights = [model.merge_and_unload().state_dict() for model in models]
    for name, weight in result.items():
        mean = 0.75 * weights[0][name] + 0.25 * weights[1][name]
        torch.testing.assert_close(weight, mean, rtol=0, atol=1e-6)

    # Outputs scaled instead of inputs: the same names of tensors, another meaning.
    other = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])
    with pytest.raises(FedrotError, match=r"feedforward_modules is None, .* has \['down_proj'\]"):
        fedrot.aggregate([adapted(tools, config, 1), adapted(tools, other, 1)])


def test_prompt_tuning_assigns_tokens_and_says_that_places_matter(tools):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    reference = adapted(tools, config, 1)
    state = tensors(reference)
    order = torch.tensor([2, 0, 1, 3, 4])
    client = like(reference, {KEY: state[KEY][order]})
    # No invariance: rotary embeddings and the causal mask know the places.
    assert (says(client) - says(reference)).abs().max() > 0.05

    merged = fedrot.aggregate([client, reference], reference)
    assert_states(merged.tensors, state)
    (note,) = merged.notes
    assert "adapters[0] ('default'): 3 of 5 virtual tokens changed places" in note

    plain = fedrot.aggregate([client, reference], reference, method=FedRot(0.0))
    mean = (state[KEY] + state[KEY][order]) / 2
    torch.testing.assert_close(plain.tensors[KEY], mean)
    assert plain.notes == []

    # Clients that started from the reference keep their places.
    near = {KEY: state[KEY] + 0.05}
    kept = fedrot.aggregate([like(reference, near)], reference)
    assert_states(kept.tensors, near, 1e-7)
    assert kept.notes == []


def test_two_stacks_have_prompts_of_their_own():
    """An encoder's and a decoder's tokens follow one another and are not exchanged."""
    gen = torch.Generator().manual_seed(1)
    prompt = torch.randn(2 * 3, 4, generator=gen)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 4}
    config |= {"num_transformer_submodules": 2}
    moved = prompt[[1, 0, 2, 5, 4, 3]]
    merged = fedrot.aggregate([({KEY: moved}, config)], ({KEY: prompt}, config))
    assert torch.equal(merged.tensors[KEY], prompt)
    across = prompt[[3, 4, 5, 0, 1, 2]]
    merged = fedrot.aggregate([({KEY: across}, config)], ({KEY: prompt}, config))
    assert sorted(merged.tensors[KEY][:3].tolist()) == sorted(prompt[3:].tolist())


def in_other_orders(prefix: torch.Tensor, seed: int) -> torch.Tensor:
    """The same prefix, the tokens of every layer and head in an order of their own."""
    gen = torch.Generator().manual_seed(seed)
    heads = prefix.clone().view(TOKENS, LAYERS, 2, HEADS, WIDTH)
    for layer in range(LAYERS):
        for head in range(HEADS):
            order = torch.randperm(TOKENS, generator=gen)
            heads[:, layer, :, head] = heads[order, layer, :, head]
    return heads.view(prefix.shape)


def test_prefix_tuning_assigns_tokens_in_every_layer_and_head(tools, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    reference = adapted(tools, config, 1)
    state = tensors(reference)
    assert state[KEY].shape == (TOKENS, LAYERS * 2 * HEADS * WIDTH)
    client = like(reference, {KEY: in_other_orders(state[KEY], 3)})
    merged = assert_recovered(reference, client, atol=0.0, same=1e-5)
    (note,) = merged.notes
    assert "in another order in 4 of 4 heads: the same function" in note

    merged.save(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "merged"))
    torch.testing.assert_close(says(loaded), says(reference), rtol=0, atol=1e-6)

    # Keys without their values are another function, so both move together.
    torn = state[KEY].clone().view(TOKENS, LAYERS, 2, HEADS, WIDTH)
    torn[:, 0, 0] = torn[:, 0, 0].flip(0)
    other = like(reference, {KEY: torn.view(TOKENS, -1)})
    assert (says(other) - says(reference)).abs().max() > 0.05

    projected = {**reference.peft_config["default"].to_dict(), "prefix_projection": True}
    with pytest.raises(FedrotError, match=r"prefix_projection is set: .* train without it"):
        fedrot.aggregate([(state, projected)])


def test_whole_parameters_are_averaged(tools):
    """`mean(W_0 + D_i) = W_0 + mean(D_i)`, and integer buffers are rounded."""
    base = llama().state_dict()
    gen = torch.Generator().manual_seed(1)
    deltas = [{k: torch.randn(v.shape, generator=gen) for k, v in base.items()} for _ in range(2)]
    models = [{k: base[k] + delta[k] for k in base} for delta in deltas]
    counted = [{**m, "steps": torch.tensor(n)} for n, m in enumerate(models, 1)]
    found = fedrot.aggregate([(m, None) for m in counted], weights=[1, 3]).tensors["steps"]
    assert found == 2 and found.dtype == torch.int64  # the mean is 1.75
    merged = fedrot.aggregate([(m, None) for m in models], weights=[1, 3])
    mean = {k: base[k] + 0.25 * deltas[0][k] + 0.75 * deltas[1][k] for k in base}
    assert_states(merged.tensors, mean, 1e-6)
    fresh = llama()
    fresh.load_state_dict(merged.tensors)
    assert merged.notes == []
    with pytest.raises(FedrotError, match="whole parameters are no adapter: load_state_dict"):
        merged.save("nowhere")

    lora = adapted(tools, LoraConfig(r=4, target_modules=TARGETS), 1)
    for state in (lora.state_dict(), tensors(lora)):
        with pytest.raises(FedrotError, match="belongs to an adapter, which a plain average may"):
            fedrot.aggregate([(state, None)])
    with pytest.raises(FedrotError, match=r"is whole parameters, the reference .* is LoRA"):
        fedrot.aggregate([(base, None)], lora)
