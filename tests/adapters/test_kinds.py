"""Other adapters than LoRA by the command line, their options, and what is refused."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, PeftModel, PeftType, VeraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from typer.testing import CliRunner

import fedrot
from fedrot.adapters import gather, measure_spectrum, read
from fedrot.adapters.kinds import KINDS, REFUSED_TYPES, kind_of
from fedrot.adapters.kinds.base import NEUTRAL
from fedrot.adapters.kinds.prompts import assignment
from fedrot.cli import app
from fedrot.errors import FedrotError
from fedrot.methods import FedRot, FlexLoRA, Robust

LINEAR = {"target_modules": ["lin1", "lin2"]}
CONFIGS = {
    "LoHa": lambda **kw: LoHaConfig(r=3, **LINEAR, **kw),
    "VeRA": lambda **kw: VeraConfig(r=3, **LINEAR, **kw),
    "(IA)3": lambda **kw: IA3Config(feedforward_modules=["lin1"], **LINEAR, **kw),
}


def adapted(tools, config, seed: int):
    model = PeftModel(tools.base_model(), config)
    return tools.randomised(model, seed)


def run(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("title", CONFIGS)
def test_the_command_writes_what_peft_loads(tools, tmp_path, title):
    models = [adapted(tools, CONFIGS[title](modules_to_save=["head"]), seed) for seed in (1, 2, 3)]
    folders = [
        tools.saved(model, tmp_path / name) for model, name in zip(models, "abc", strict=True)
    ]
    out = tmp_path / "out"
    reference = ("--reference", folders[2])
    code, stdout, stderr = run("aggregate", *folders[:2], "-o", out, *reference, "--weights", "3,1")
    assert (code, stderr) == (0, "")
    assert f"adapters              {title}\n" in stdout and "distance, aligned" in stdout

    merged = fedrot.aggregate(models[:2], models[2], weights=[3, 1])
    written = tools.tensors(out)
    assert written.keys() == merged.tensors.keys()
    assert all(torch.equal(written[key], merged.tensors[key]) for key in written)
    # Beside the adapter: whole parameters.
    (head,) = [key for key in written if key.endswith("head.weight")]
    heads = [tools.tensors(folder)[head] for folder in folders]
    torch.testing.assert_close(written[head], 0.75 * heads[0] + 0.25 * heads[1])

    origin = json.loads((out / "fedrot_provenance.json").read_text())
    assert origin["measured"] == merged.distances
    assert [client["weight"] for client in origin["clients"]] == [0.75, 0.25]
    assert origin["measured"]["distance_aligned"] <= origin["measured"]["distance_plain"]

    # Loaded by PEFT, and put back into a model as another adapter, it says the same.
    says = tools.output_of(out)
    assert (says - tools.says(models[2])).abs().max() > 0.01
    merged.add_to(models[2], "merged")
    models[2].set_adapter("merged")
    torch.testing.assert_close(tools.says(models[2]), says, rtol=0, atol=1e-6)


def test_distances_count_clients_by_their_weight(tools):
    models = [adapted(tools, CONFIGS["(IA)3"](), seed) for seed in (1, 2)]
    one, two = (fedrot.aggregate([m]).tensors for m in models)
    apart = sum(float((one[key] - two[key]).square().sum()) for key in one if "ia3_l" in key)
    found = fedrot.aggregate(models, models[0], weights=[3, 1]).distances
    wanted = pytest.approx((0.25 * apart) ** 0.5)
    assert found == {"distance_plain": wanted, "distance_aligned": wanted}


def test_a_soft_rotation_is_part_of_the_way(tools):
    models = [adapted(tools, CONFIGS["LoHa"](), seed) for seed in (1, 2)]
    whole, half, none = (
        fedrot.aggregate(models, method=FedRot(lam)).distances["distance_aligned"]
        for lam in (1.0, 0.4, 0.0)
    )
    assert whole < 0.99 * half < 0.99**2 * none


@pytest.mark.parametrize(
    ("title", "args", "message"),
    [
        (
            "(IA)3",
            ("--lam", 0.4),
            r"--lam must be 0 \(plain average\) or 1 \(aligned\) for \(IA\)3",
        ),
        ("VeRA", ("--lam", "auto"), "--lam must be 0 .* for VeRA: .* got auto"),
        ("VeRA", ("--align", "A"), "--align must be left alone for VeRA, which has no factors"),
        ("(IA)3", ("--improper",), "--proper must be left alone .*, got False"),
        ("LoHa", ("--lam", "auto"), "LoHa takes a number for lam and joint, A or B for align"),
        ("LoHa", ("--align", "optimal"), "LoHa takes a number for lam .* align optimal"),
        ("LoHa", ("--rule", "median"), "Robust FedRot-LoRA takes LoRA factors; LoHa"),
        ("LoHa", ("--rule", "exact"), "FlexLoRA takes LoRA factors; LoHa"),
        ("LoHa", ("--rank", 8), "--rank must be left out for LoHa, .* got 8"),
        ("VeRA", ("--rank", "auto"), "--rank must be left out for VeRA, .* got auto"),
        ("VeRA", ("--rank", 8, "--rule", "exact"), "--rank must be left out for VeRA, .* got 8"),
        ("(IA)3", ("--rank", "auto", "--energy", 0.9), r"--rank must be left out for \(IA\)3, "),
        ("LoHa", ("--energy", 0.9), "--energy must be left out for LoHa, .* got 0.9"),
    ],
)
def test_options_that_mean_nothing_are_refused(tools, tmp_path, title, args, message):
    folder = tools.saved(adapted(tools, CONFIGS[title](), 1), tmp_path / "a")
    code, stdout, stderr = run("aggregate", folder, "-o", tmp_path / "out", *args)
    assert (code, stdout) == (1, "")
    assert re.search(message, stderr)
    assert not (tmp_path / "out").exists()


def test_methods_of_lora_are_refused(tools):
    model = adapted(tools, CONFIGS["LoHa"](), 1)
    for method in (FlexLoRA(), Robust(), FedRot(rotation="random")):
        with pytest.raises(FedrotError, match=f"method: {method.name}.* LoHa adapters are merged"):
            fedrot.aggregate([model], method=method)
    with pytest.raises(FedrotError, match="FedRot-LoRA, rotation shifted, takes LoRA factors"):
        fedrot.aggregate([model], method=FedRot(rotation="shifted"))
    for options, named in [
        ({"rank": "auto"}, "rank must be left out for LoHa, .* got auto"),
        ({"rank": "auto", "method": FedRot()}, "rank must be left out for LoHa, .* got auto"),
        ({"rank": 3, "method": FlexLoRA()}, "rank must be left out for LoHa, .* got 3"),
        ({"energy": 0.5}, "energy must be left out for LoHa, .* got 0.5"),
    ]:
        with pytest.raises(FedrotError, match=named):
            fedrot.aggregate([model], **options)
    found = read(model, "a")
    with pytest.raises(FedrotError, match=r"rank must be left out for LoHa, .* got 8"):
        gather([found], found, rank=8)
    with pytest.raises(FedrotError, match=r"energy must be left out for LoHa, .* got 0\.95"):
        measure_spectrum(gather([found], found))
    with pytest.raises(FedrotError, match=r"LoHa has no products B A to measure; see distances"):
        fedrot.aggregate([model]).misalignment  # noqa: B018


@pytest.mark.parametrize("title", CONFIGS)
def test_inspect_says_how_far_apart_they_are(tools, tmp_path, title):
    models = [adapted(tools, CONFIGS[title](), seed) for seed in (1, 2)]
    folders = [tools.saved(m, tmp_path / name) for m, name in zip(models, "ab", strict=True)]
    options = ("--weights", "3,1")
    code, stdout, stderr = run("inspect", *folders, *options, "--json")
    assert (code, stderr) == (0, "")
    report, merged = json.loads(stdout), fedrot.aggregate(folders, weights=[3, 1])
    assert report["reference"] == str(folders[0])
    for adapter in report["adapters"]:
        assert adapter["kind"] == title
        assert [row["tensor"] for row in adapter["tensors"]] == sorted(
            key for key in merged.tensors if not re.search(r"vera_[AB]$", key)
        )
        shapes = {row["tensor"]: row["shape"] for row in adapter["tensors"]}
        assert all(list(merged.tensors[key].shape) == shape for key, shape in shapes.items())
    distances, summary = report["distances"], report["summary"]
    assert distances[str(folders[0])] == {"plain": 0, "aligned": pytest.approx(0, abs=1e-6)}
    for kind in ("plain", "aligned"):
        apart = distances[str(folders[1])][kind]
        assert apart > 0 and summary[f"distance_{kind}"] == pytest.approx(apart / 2)
        assert summary[f"distance_{kind}"] == pytest.approx(merged.distances[f"distance_{kind}"])
    code, stdout, _ = run("inspect", *folders, *options)
    last = stdout.splitlines()[-2].split()
    assert code == 0 and f"b:{title}" in "".join(stdout.split())  # wherever the line breaks
    assert last[:2] == ["all", f"{summary['distance_plain']:.4g}"]
    share = 100 * summary["distance_plain"] / summary["norm"]
    assert last[2] == f"({share:.2g}" if share < 100 else f"({share:.0f}"


def test_inspect_of_one_adapter_of_another_kind(tools, tmp_path):
    folder = tools.saved(adapted(tools, CONFIGS["LoHa"](), 1), tmp_path / "a")
    code, stdout, stderr = run("inspect", folder)
    rows = [line.split() for line in stdout.splitlines() if "hada" in line]
    assert (code, stderr) == (0, "") and "distance" not in stdout
    assert ["lin1.hada_w1_a", "9x3", "float32"] in rows and len(rows) == 8
    for args, named in (
        (("--rank", "auto"), "rank must be left out for LoHa, .* got auto"),
        (("--rank", "auto", "--energy", 0.9), "rank must be left out for LoHa"),
        (("--rank", 4, "--reference", folder), "rank must be left out for LoHa, .* got 4"),
        (("--align", "gpa", "--reference", folder), "LoHa takes a number for lam and joint"),
    ):
        code, _, stderr = run("inspect", folder, *args)
        assert code == 1 and re.search(named, stderr)


@pytest.mark.parametrize("title", CONFIGS)
def test_the_result_shares_no_memory(tools, title):
    """Not of what is frozen either, as `A` and `B` of VeRA."""
    models = [adapted(tools, CONFIGS[title](), seed) for seed in (1, 2)]
    memory = {t.data_ptr() for model in models for t in model.state_dict().values()}
    assert not memory & {t.data_ptr() for t in fedrot.aggregate(models).tensors.values()}


def test_alpha_of_loha_is_above_zero(tools):
    model = adapted(tools, CONFIGS["LoHa"](), 1)
    state = fedrot.aggregate([model]).tensors
    config = {"peft_type": "LOHA", "r": 3, "alpha": 8}
    for wrong, value in (({"alpha": 0}, 0), ({"alpha_pattern": {"lin1": -2}}, -2)):
        with pytest.raises(FedrotError, match=rf"adapters\[0\]: alpha must be above 0 .* {value}$"):
            fedrot.aggregate([(state, {**config, **wrong})])


def test_two_kinds_do_not_mix(tools):
    models = [adapted(tools, CONFIGS[title](), 1) for title in ("LoHa", "VeRA")]
    with pytest.raises(FedrotError, match=r"adapters\[1\] .*: is VeRA, the reference .* is LoHa"):
        fedrot.aggregate(models)


def test_shapes_and_keys(tools):
    model = adapted(tools, CONFIGS["LoHa"](), 1)
    merged = fedrot.aggregate([model])
    state, config = merged.tensors, merged.config
    key = "base_model.model.lin1.hada_w1_a"
    cases = [
        ({k: v for k, v in state.items() if k != key}, f"layer .* has no '{key}'"),
        ({**state, key: state[key][:, :2]}, rf"'{key}' of shape \(9, 2\) and"),
        ({**state, key: state[key][0]}, rf"'{key}' has shape \(3,\), not two"),
        ({**state, key: state[key] * torch.nan}, f"'{key}' has non-finite values"),
        ({**state, "base_model.model.lin1.hada_x": state[key]}, "unknown key .*hada_x"),
        ({"base_model.model.lin1.lora_A.weight": state[key]}, "unknown key .*lora_A"),
        ({}, "the state dict has no tensors of LoHa"),
    ]
    for wrong, message in cases:
        with pytest.raises(FedrotError, match=message):
            fedrot.aggregate([(wrong, config)])
    smaller = adapted(tools, LoHaConfig(r=2, **LINEAR), 1)
    with pytest.raises(FedrotError, match=r"has shape \(9, 2\), the reference .* has \(9, 3\)"):
        fedrot.aggregate([smaller], model)

    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "token_dim": 4}
    prefix |= {"num_layers": 2, "num_attention_heads": 2}
    for change, message in [
        ({"num_virtual_tokens": 4}, r"shape \(3, 16\), the configuration gives it \(4, 16\)"),
        ({"num_layers": None}, "num_layers must be a positive integer, got None"),
        ({"num_attention_heads": 3}, "token_dim 4 is no multiple of 3 heads"),
    ]:
        with pytest.raises(FedrotError, match=message):
            fedrot.aggregate([({"prompt_embeddings": torch.ones(3, 16)}, {**prefix, **change})])


def test_convolutions_of_loha(tools):
    """Without a core tensor, a convolution is the matrix that its flattened weight is."""
    model = adapted(tools, LoHaConfig(r=3, target_modules=["conv"]), 1)
    state = fedrot.aggregate([model]).tensors
    key = "base_model.model.conv.hada_w1"
    R = tools.rotation(3, torch.Generator().manual_seed(1)).float()
    turned = {**state, f"{key}_a": state[f"{key}_a"] @ R, f"{key}_b": R.T @ state[f"{key}_b"]}
    config = model.peft_config["default"]
    merged = fedrot.aggregate([(turned, config), model], model).tensors
    torch.testing.assert_close(merged[f"{key}_a"], state[f"{key}_a"], rtol=0, atol=1e-6)
    assert (turned[f"{key}_a"] - state[f"{key}_a"]).abs().max() > 0.1

    core = adapted(tools, LoHaConfig(r=3, target_modules=["conv"], use_effective_conv2d=True), 1)
    with pytest.raises(
        FedrotError, match=r"use_effective_conv2d keeps a core tensor .* without it"
    ):
        fedrot.aggregate([core])


def test_bf16_is_rounded_once(tools):
    models = [adapted(tools, CONFIGS["LoHa"](), seed).to(torch.bfloat16) for seed in (1, 2)]
    merged = fedrot.aggregate(models).tensors
    wide = fedrot.aggregate([model.float() for model in models]).tensors
    assert all(merged[key].dtype == torch.bfloat16 for key in merged)
    assert all(torch.equal(merged[key], wide[key].bfloat16()) for key in merged)


def test_assignment_is_the_best_permutation_and_stays_where_none_is_better():
    theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    ours = torch.tensor([[[-0.9, 0.1], [1.1, 0.0], [0.1, 0.8]]])
    assert assignment(ours, theirs[None]).tolist() == [[1, 2, 0]]
    assert assignment(ours, torch.zeros(1, 3, 2)).tolist() == [[0, 1, 2]]
    same = torch.ones(2, 4, 3)
    assert assignment(same, same).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("config", [LoKrConfig(r=2, **LINEAR), HRAConfig(r=2, **LINEAR)])
def test_refused_adapters_say_what_to_do(tools, tmp_path, config):
    name = config.peft_type.value
    folder = tools.saved(adapted(tools, config, 1), tmp_path / "a")
    with pytest.raises(FedrotError) as caught:
        fedrot.aggregate([folder])
    message = str(caught.value)
    assert message.startswith(f"{folder}: peft_type is '{name}', not LORA, LOHA, VERA, IA3, ")
    assert REFUSED_TYPES[name] in message and "merge_and_unload" in message

    # What it says to do: the updates are averaged exactly.
    weights = []
    for seed in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights.append(adapted(tools, config, seed).merge_and_unload().state_dict())
    merged = fedrot.aggregate([(state, None) for state in weights]).tensors
    mean = (weights[0]["lin1.weight"] + weights[1]["lin1.weight"]) / 2
    torch.testing.assert_close(merged["lin1.weight"], mean)


@pytest.mark.parametrize("peft_type", [t.value for t in PeftType])
def test_every_type_of_the_installed_peft_is_merged_or_refused(peft_type):
    config = {"peft_type": peft_type}
    if peft_type in ("LORA", *KINDS):
        kind = kind_of(config, "a")
        assert kind is KINDS.get(peft_type)
    else:
        with pytest.raises(FedrotError, match=f"^a: peft_type is '{peft_type}', not LORA, .*: "):
            kind_of(config, "a")


@pytest.mark.parametrize("peft_type", KINDS)
def test_every_option_of_the_installed_peft_has_been_thought_about(peft_type):
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])}
    kind = KINDS[peft_type]
    assert fields - (NEUTRAL | kind.neutral | kind.must_agree.keys()) == set()
    with pytest.raises(FedrotError, match="sets use_future=True, an option of"):
        kind_of({"peft_type": peft_type, "use_future": True}, "a")
