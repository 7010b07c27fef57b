"""Merging adapters that PEFT wrote, into one that PEFT loads: values against float64 by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedrot.adapters import aggregate, gather, measure, merge, read_adapter, write_adapter
from fedrot.errors import FedrotError
from fedrot.methods import FedRot, Robust

ALL = ["emb", "conv", "lin1", "lin2"]


def run(clients, output: Path, reference=None, weights=None, lam=1.0, align="joint", rank=None):
    """Read, merge, write; the folder written."""
    read = [read_adapter(path) for path in clients]
    ref = read_adapter(reference) if reference is not None else read[0]
    merged = merge(gather(read, ref, weights, rank), FedRot(lam, align))
    write_adapter(output, merged.config, merged.tensors, {})
    return output


@pytest.mark.parametrize("align", ["joint", "A", "B"])
def test_one_adapter_in_two_bases_stays_that_adapter(save, regauge, tools, tmp_path, align):
    a = save("a", 1, target_modules=ALL)
    b = regauge(a, "b", 5)
    expected = tools.output_of(a)
    torch.testing.assert_close(tools.output_of(b), expected, rtol=0, atol=2e-5)

    aligned = run([a, b], tmp_path / "aligned", align=align)
    torch.testing.assert_close(tools.output_of(aligned), expected, rtol=0, atol=5e-5)
    plain = run([a, b], tmp_path / "plain", lam=0.0)
    assert (tools.output_of(plain) - expected).abs().max() > 0.1


def test_weighted_merge_equals_the_hand_computation(save, tools, tmp_path):
    a, b, ref = (
        save(name, seed, target_modules=ALL) for name, seed in (("a", 1), ("b", 2), ("r", 3))
    )
    merged = tools.tensors(run([a, b], tmp_path / "m", ref, weights=[3, 1]))
    t = [{k: v.double() for k, v in tools.tensors(folder).items()} for folder in (a, b, ref)]
    for key_A in [k for k in merged if "lora_A" in k or "embedding_A" in k]:
        key_B = key_A.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        f = [(state[key_A].flatten(1), state[key_B].flatten(1)) for state in t]
        A, B = tools.hand_merge(f[:2], f[2], [0.75, 0.25])
        assert merged[key_A].shape == t[0][key_A].shape
        torch.testing.assert_close(merged[key_A].flatten(1).double(), A, rtol=0, atol=5e-6)
        torch.testing.assert_close(merged[key_B].flatten(1).double(), B, rtol=0, atol=5e-6)


def test_without_rotation_the_merge_is_the_weighted_mean(save, tools, tmp_path):
    a, b = save("a", 1), save("b", 2)
    merged = tools.tensors(run([a, b], tmp_path / "m", weights=[3, 1], lam=0.0))
    ta, tb = tools.tensors(a), tools.tensors(b)
    for key, value in merged.items():
        torch.testing.assert_close(value, 0.75 * ta[key] + 0.25 * tb[key], rtol=0, atol=1e-6)


REFERENCE = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("lam", [0.3, 1.0])
@pytest.mark.parametrize(
    "client",
    [
        pytest.param({"lora_alpha": 32}, id="alpha"),
        pytest.param({"use_rslora": True, "lora_alpha": 6}, id="rslora"),
        pytest.param({"r": 2, "lora_alpha": 10}, id="smaller-rank"),
        pytest.param({"rank_pattern": {"lin2": 3}, "alpha_pattern": {"lin1": 20}}, id="patterns"),
        pytest.param({"rank_pattern": {"lin.": 1}, "r": 4}, id="regex-pattern"),
        pytest.param({"target_modules": ALL, "r": 3, "lora_alpha": 5}, id="all-layer-kinds"),
        pytest.param({"lora_bias": True, "lora_alpha": 3}, id="lora-bias"),
        pytest.param({"use_dora": True, "lora_alpha": 3}, id="dora"),
    ],
)
def test_a_single_client_keeps_its_function_on_the_reference_scale(
    save, tools, tmp_path, client, lam
):
    """`s_ref B A` of the result is `s_i B_i A_i` of the client, whatever the rotation."""
    shared = {k: client[k] for k in ("target_modules", "lora_bias", "use_dora") if k in client}
    ref = save("ref", 2, **REFERENCE, **shared)
    one = save("one", 1, **client)
    merged = run([one], tmp_path / "m", ref, lam=lam)
    torch.testing.assert_close(tools.output_of(merged), tools.output_of(one), rtol=0, atol=5e-5)
    assert (tools.output_of(merged) - tools.output_of(ref)).abs().max() > 0.05
    assert (merged / "adapter_config.json").read_text() and json.loads(
        (merged / "adapter_config.json").read_text()
    ) == json.loads((ref / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param({"r": 2, "lora_alpha": 5}, id="plain"),
        pytest.param({"r": 3, "lora_alpha": 7, "use_rslora": True}, id="rslora-fractional-alpha"),
        pytest.param(
            {"r": 2, "rank_pattern": {"lin2": 6}, "alpha_pattern": {"lin1": 3}}, id="patterns"
        ),
        pytest.param({"r": 2, "target_modules": ALL}, id="all-layer-kinds"),
    ],
)
def test_rank_pads_the_reference_and_keeps_every_scaling(save, tools, tmp_path, reference):
    targets = {k: v for k, v in reference.items() if k == "target_modules"}
    ref = save("ref", 2, **reference)
    one = save("one", 1, r=5, lora_alpha=9, **targets)
    with pytest.raises(FedrotError, match=r"one: layer '.*' has rank 5.*rank=5 \(--rank 5\) pads"):
        gather([read_adapter(one)], read_adapter(ref))

    padded = run([ref], tmp_path / "padded", ref, rank=5)
    torch.testing.assert_close(tools.output_of(padded), tools.output_of(ref), rtol=0, atol=1e-5)
    for name, layer in read_adapter(padded).keys.layers.items():
        before = read_adapter(ref).keys.layers[name]
        assert layer.rank == max(5, before.rank)
        assert layer.scaling == pytest.approx(before.scaling, rel=1e-12)
    merged = run([one], tmp_path / "m", ref, rank=5)
    torch.testing.assert_close(tools.output_of(merged), tools.output_of(one), rtol=0, atol=5e-5)


def test_fresh_reference_with_zero_B_is_fine(save, tools, regauge, tmp_path):
    a = save("a", 1)
    b = save("b", 2)
    ref = save("ref", 3)
    zero_B = {"lora_B": 0.0}
    tools.rewrite(ref, lambda t: {k: v * zero_B.get(k.split(".")[-2], 1.0) for k, v in t.items()})
    merged = tools.tensors(run([a, b], tmp_path / "m", ref))
    states = [{k: v.double() for k, v in tools.tensors(f).items()} for f in (a, b, ref)]
    key_A = "base_model.model.lin1.lora_A.weight"
    f = [(s[key_A], s[key_A.replace("lora_A", "lora_B")]) for s in states]
    A, B = tools.hand_merge(f[:2], f[2], [0.5, 0.5])
    torch.testing.assert_close(merged[key_A].double(), A, rtol=0, atol=5e-6)
    torch.testing.assert_close(
        merged[key_A.replace("lora_A", "lora_B")].double(), B, rtol=0, atol=5e-6
    )


def test_whole_parameters_are_averaged_plainly(save, tools, tmp_path):
    kw = {"modules_to_save": ["head"], "bias": "all"}
    a, b = save("a", 1, **kw), save("b", 2, **kw)
    merged_folder = run([a, b], tmp_path / "m", weights=[1, 3])
    merged, ta, tb = (tools.tensors(folder) for folder in (merged_folder, a, b))
    # `original_module` is the frozen copy that PEFT saves with bias="all".
    plain = [key for key in merged if "lora_" not in key and "original_module" not in key]
    assert "base_model.model.head.weight" in plain
    assert "base_model.model.lin1.base_layer.bias" in plain
    for key in plain:
        assert not torch.equal(ta[key], tb[key]), key
        torch.testing.assert_close(merged[key], 0.25 * ta[key] + 0.75 * tb[key])
    tools.output_of(merged_folder)  # PEFT loads it


@pytest.mark.parametrize("rule", ["median", "clip", "krum"])
def test_robust_rules_cover_what_lies_beside_the_factors(rule, save, tools):
    """One of five adapters is a thousand times as large: a head, a bias, and a LoRA bias."""
    kw = {"modules_to_save": ["head"], "lora_bias": True}
    honest = [read_adapter(save(str(i), i, **kw)) for i in range(4)]
    bad = replace(honest[0], tensors={k: -1000 * t for k, t in honest[0].tensors.items()})
    ref = read_adapter(save("ref", 9, **kw))
    uploads = gather([*honest, bad], ref)
    out, mean = (merge(uploads, method).tensors for method in (Robust(rule), FedRot(1.0)))
    keys = [key for key in out if "head" in key or "lora_B.bias" in key]
    assert len(keys) > 2
    for key in keys:
        clients = torch.stack([a.tensors[key] for a in honest])
        assert float(mean[key].abs().max()) > 50 * float(clients.abs().max())
        assert float(out[key].abs().max()) <= 2 * float(clients.abs().max())
        if rule == "median":
            every = torch.cat([clients, bad.tensors[key][None]])
            torch.testing.assert_close(out[key], every.median(0).values)


def test_lora_bias_is_averaged_on_the_reference_scale(save, tools, tmp_path):
    """PEFT adds `scaling * (B A x + bias)`: scalings 2 and 8, result on 2."""
    a = save("a", 1, lora_bias=True, lora_alpha=8)
    b = save("b", 2, lora_bias=True, lora_alpha=32)
    key = "base_model.model.lin1.lora_B.bias"
    merged = tools.tensors(run([a, b], tmp_path / "m"))[key]
    expected = 0.5 * tools.tensors(a)[key] + 0.5 * 4 * tools.tensors(b)[key]
    torch.testing.assert_close(merged, expected)


def test_dora_magnitudes_are_averaged_and_called_an_approximation(save, tools, tmp_path):
    a, b = (
        save(n, s, use_dora=True, target_modules=["lin1", "conv"]) for n, s in (("a", 1), ("b", 2))
    )
    uploads = gather([read_adapter(a), read_adapter(b)], read_adapter(a))
    assert any("approximation" in note for note in uploads.notes)
    merged = merge(uploads, FedRot(1.0)).tensors
    for module in ("lin1", "conv"):
        key = f"base_model.model.{module}.lora_magnitude_vector"
        mean = (tools.tensors(a)[key] + tools.tensors(b)[key]) / 2
        torch.testing.assert_close(merged[key], mean)


def test_trained_token_rows_are_averaged(save, tools, tmp_path):
    a, b = (save(n, s, trainable_token_indices={"emb": [1, 4]}) for n, s in (("a", 1), ("b", 2)))
    key = "base_model.model.emb.token_adapter.trainable_tokens_delta"
    merged = run([a, b], tmp_path / "m")
    mean = (tools.tensors(a)[key] + tools.tensors(b)[key]) / 2
    torch.testing.assert_close(tools.tensors(merged)[key], mean)
    tools.output_of(merged)
    other = save("c", 3, trainable_token_indices={"emb": [1, 5]})
    with pytest.raises(FedrotError, match="trainable_token_indices"):
        run([a, other], tmp_path / "n")


def test_bf16_is_rounded_once_and_dtypes_may_differ(save, tools, tmp_path):
    a, b = save("a", 1), save("b", 2, dtype=torch.bfloat16)
    ref = save("ref", 3, dtype=torch.bfloat16)
    merged = tools.tensors(run([a, b], tmp_path / "m", ref))
    states = [{k: v.double() for k, v in tools.tensors(f).items()} for f in (a, b, ref)]
    for key_A in [k for k in merged if "lora_A" in k]:
        key_B = key_A.replace("lora_A", "lora_B")
        f = [(s[key_A], s[key_B]) for s in states]
        for value, exact in zip(
            (merged[key_A], merged[key_B]), tools.hand_merge(f[:2], f[2], [0.5, 0.5]), strict=True
        ):
            assert value.dtype == torch.bfloat16
            # One rounding: at most half a bf16 step, and fp32 noise.
            limit = exact.abs() * 2**-8 + 1e-5
            assert ((value.double() - exact).abs() <= limit).all()


def test_float64_stays_float64(save, tools, tmp_path):
    a, b = (save(n, s, dtype=torch.float64) for n, s in (("a", 1), ("b", 2)))
    merged = tools.tensors(run([a, b], tmp_path / "m"))
    states = [tools.tensors(f) for f in (a, b)]
    key_A, key_B = (f"base_model.model.lin1.lora_{side}.weight" for side in "AB")
    f = [(s[key_A], s[key_B]) for s in states]
    A, B = tools.hand_merge(f, f[0], [0.5, 0.5])
    torch.testing.assert_close(merged[key_A], A, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged[key_B], B, rtol=0, atol=1e-12)


def test_output_that_overflows_its_dtype_is_refused(save, tools):
    a = save("a", 1, lora_alpha=8e6)
    ref = save("ref", 2, dtype=torch.float16)
    tools.rewrite(a, lambda t: {k: v * 1000 for k, v in t.items()})
    uploads = gather([read_adapter(a)], read_adapter(ref))
    with pytest.raises(FedrotError, match=r"does not fit into torch.float16"):
        merge(uploads, FedRot(1.0))


def test_pissa_needs_the_same_rank_and_scaling(save, tools, tmp_path):
    """PEFT takes `s B_0 A_0` off the base again on loading: equal only for equal r and s."""
    a = save("a", 1, init_lora_weights="pissa")
    b = save("b", 2, init_lora_weights="pissa")
    run([a, b], tmp_path / "m", lam=0.0)
    one = run([b], tmp_path / "one", a)
    torch.testing.assert_close(tools.output_of(one), tools.output_of(b), rtol=0, atol=5e-5)
    with pytest.raises(FedrotError, match="init_lora_weights"):
        run([a, save("plain", 3)], tmp_path / "n")
    with pytest.raises(FedrotError, match="rank 4 and scaling 4"):
        run([a, save("alpha", 3, init_lora_weights="pissa", lora_alpha=16)], tmp_path / "n")
    with pytest.raises(FedrotError, match="would have rank 6"):
        run([a, b], tmp_path / "n", rank=6)
    with pytest.raises(FedrotError, match=r"a: init_lora_weights='pissa' .* for rank 4"):
        run(
            [save("six", 4, init_lora_weights="pissa", r=6, lora_alpha=12)],
            tmp_path / "n",
            a,
            None,
            rank=6,
        )


def test_multihead_attention_patterns_cover_the_output_projection(tmp_path):
    """PEFT keeps out_proj's factors under `.base_layer`, with the rank of the whole module."""
    from peft import LoraConfig, get_peft_model

    net = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8))
    config = LoraConfig(r=4, target_modules=["0", "1"], rank_pattern={"0": 2}, lora_alpha=6)
    get_peft_model(net, config).save_pretrained(tmp_path / "a")
    layers = read_adapter(tmp_path / "a").keys.layers
    assert {name: (la.rank, la.scaling) for name, la in layers.items()} == {
        "0": (2, 3.0),
        "0.base_layer.out_proj": (2, 3.0),
        "1": (4, 1.5),
    }


def test_measure_reports_angle_and_errors_of_the_scaled_update(save, regauge):
    a = save("a", 1)
    b = save("b", 2, lora_alpha=24)
    read = [read_adapter(a), read_adapter(b)]
    uploads = gather(read, read[0], [1, 3])
    measured = measure(uploads, FedRot(1.0))
    merged = merge(uploads, FedRot(1.0)).tensors
    key = "base_model.model.lin1.lora_{}.weight"
    A, B = ([x.tensors[key.format(side)].double() for x in read] for side in "AB")
    ideal = 0.25 * 2 * B[0] @ A[0] + 0.75 * 6 * B[1] @ A[1]
    result = 2 * merged[key.format("B")].double() @ merged[key.format("A")].double()
    root = 3**0.5  # s_b / s_a = 3
    plain = 2 * (0.25 * B[0] + 0.75 * root * B[1]) @ (0.25 * A[0] + 0.75 * root * A[1])
    assert measured.norm["lin1"] == pytest.approx(float(ideal.norm()), rel=1e-5)
    assert measured.aligned["lin1"] == pytest.approx(float((ideal - result).norm()), rel=1e-4)
    assert measured.plain["lin1"] == pytest.approx(float((ideal - plain).norm()), rel=1e-4)
    # The reference is the first client; eigenvalues of rotations near 1 have angles ~ 1e-3 deg.
    assert measured.angles[0].max() < 0.1
    assert measured.angles[1].min() > 5


# PEFT announces what it saves, and reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_transformer_with_classifier_and_embedding(tmp_path, tools):
    """A BERT from its configuration: PEFT saves the classifier and the embedding's base whole."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}

    def bert() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **size))

    models = []

    def client(name: str, seed: int) -> Path:
        targets = ["word_embeddings", "query", "value", "embed_tokens"]
        config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=targets)
        model = get_peft_model(bert(), config)
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in (p for p in model.parameters() if p.requires_grad):
                value.add_(0.3 * torch.randn(value.shape, generator=gen))
        model.save_pretrained(tmp_path / name)
        models.append(model)
        return tmp_path / name

    def logits(folder: Path) -> Tensor:
        model = PeftModel.from_pretrained(bert(), str(folder)).eval()
        with torch.no_grad():
            return model(torch.arange(12).reshape(2, 6)).logits

    a, b = client("a", 1), client("b", 2)
    keys = tools.tensors(a)
    embedding = "base_model.model.bert.embeddings.word_embeddings"
    assert {f"{embedding}.lora_embedding_A", "base_model.model.classifier.weight"} <= keys.keys()
    assert any("base_layer" in key for key in keys)

    # Twice the same adapter is that adapter; one client keeps its function on another reference.
    copy = tmp_path / "copy"
    shutil.copytree(a, copy)
    assert torch.allclose(logits(run([a, copy], tmp_path / "twice")), logits(a), atol=1e-5)
    one = run([b], tmp_path / "one", a)
    assert not torch.equal(
        tools.tensors(one)[f"{embedding}.lora_embedding_B"], keys[f"{embedding}.lora_embedding_B"]
    )
    torch.testing.assert_close(logits(one), logits(b), rtol=0, atol=1e-5)
    assert (logits(a) - logits(b)).abs().max() > 0.05

    # In memory it is the same, embeddings and all.
    in_memory = aggregate(models).tensors
    on_disk = tools.tensors(run([a, b], tmp_path / "both"))
    assert in_memory.keys() == on_disk.keys()
    assert all(torch.equal(in_memory[key], value) for key, value in on_disk.items())
