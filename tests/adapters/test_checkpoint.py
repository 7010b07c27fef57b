"""Whole models on disk: merged from their folders into one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fedrot
from fedrot.cli import app
from fedrot.errors import FedrotError

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def save(folder: Path, seed: int, **options: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder, **options)
    return model.state_dict()


@pytest.fixture
def models(tmp_path):
    """Two folders, the second in shards, and what is in them."""
    states = [save(tmp_path / "a", 1), save(tmp_path / "b", 2, max_shard_size="4KB")]
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    return [tmp_path / "a", tmp_path / "b"], states


def test_models_of_folders_are_averaged(models, tmp_path):
    (a, b), (one, other) = models
    (a / "tokenizer.json").write_text("{}")
    for old in ("pytorch_model.bin", "model.onnx"):
        (a / old).write_bytes(b"old")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["aggregate", str(a), str(b), "-o", str(out), "--weights", "1,3"]
    )
    assert result.exit_code == 0 and "whole parameters" in result.output
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"),
        "fedrot_provenance.json",
    }
    merged = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert merged.keys() == one.keys()
    for name, t in merged.items():
        torch.testing.assert_close(t, 0.25 * one[name] + 0.75 * other[name], rtol=1e-5, atol=1e-7)
    known = json.loads((out / "fedrot_provenance.json").read_text())
    assert known["clients"][1]["path"] == str(b) and known["clients"][1]["weight"] == 0.75
    assert len(known["clients"][1]["sha256"]) == 1 + len(list(b.glob("*.safetensors")))


def test_a_merge_is_replaced_by_force_and_a_model_is_not(models, tmp_path):
    folders, _ = models
    out = tmp_path / "out"
    fedrot.aggregate(folders).save(out)
    with pytest.raises(FedrotError, match="--force replaces it"):
        fedrot.aggregate(folders).save(out)
    fedrot.aggregate(folders).save(out, force=True)
    save(tmp_path / "other", 3)
    with pytest.raises(FedrotError, match="other is not an adapter folder; --force replaces only"):
        fedrot.aggregate(folders).save(tmp_path / "other", force=True)
    with pytest.raises(FedrotError, match="the output would replace the input"):
        fedrot.aggregate(folders).save(folders[1], force=True)


def test_what_is_missing_or_damaged_is_named(models, tmp_path):
    (a, b), _ = models
    shard = sorted(b.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "shard")
    with pytest.raises(FedrotError, match=f"{b}: .* {shard.name} are missing, .* neither a PEFT"):
        fedrot.aggregate([a, b])
    shard.write_bytes((tmp_path / "shard").read_bytes()[:-1])
    with pytest.raises(FedrotError, match=f"{shard}: corrupt"):
        fedrot.aggregate([a, b])
    for damaged, wrong in (
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": 3}', "not the index of a model's shards"),
        ('{"weight_map": {"x": 3}}', "not the index of a model's shards"),
    ):
        (b / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(FedrotError, match=rf"index\.json: {wrong}"):
            fedrot.aggregate([a, b])
    (b / "model.safetensors.index.json").unlink()
    with pytest.raises(FedrotError, match=r"adapter_config\.json and model\.safetensors are"):
        fedrot.aggregate([a, b])
    (b / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FedrotError, match=r"only pytorch_model\.bin, a pickle that could run code"):
        fedrot.aggregate([a, b])


def test_what_has_no_mean_is_refused(models):
    (a, b), (one, _) = models
    packed = one["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file({**one, "lm_head.weight": packed}, b / "model.safetensors")
    with pytest.raises(
        FedrotError, match=r"'lm_head\.weight' has dtype torch\.float8_e4m3fn, which"
    ):
        fedrot.aggregate([a, b])
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(FedrotError, match=r"config\.json has a quantization_config"):
        fedrot.aggregate([a, b])


def test_another_model_is_noted(models):
    (a, b), _ = models
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(
        json.dumps({**config, "num_attention_heads": 4, "use_cache": False})
    )
    (note,) = fedrot.aggregate([a, b]).notes
    assert note.startswith(f"{b}: config.json has num_attention_heads=4, the reference 2; merging")


def test_inspect_says_how_far_apart_models_are(models):
    folders, (one, other) = models
    result = CliRunner().invoke(app, ["inspect", *map(str, folders), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    names = {row["tensor"] for row in report["adapters"][0]["tensors"]}
    assert names == one.keys() - {"lm_head.weight"}  # tied, and stored once
    apart = sum(float((one[name] - other[name]).square().sum()) for name in names) ** 0.5
    (_, found) = report["distances"].values()
    assert found == {"plain": pytest.approx(apart), "aligned": pytest.approx(apart)}


def test_the_loops_are_tracked(models):
    folders, _ = models
    seen = []

    def track(items, label):
        for item in items:
            seen.append(label)
            yield item

    tracked = fedrot.aggregate(folders, track=track).tensors
    assert seen == 2 * ["reading"] + 2 * ["aligning"] + len(tracked) * ["averaging"]
    assert all(torch.equal(t, tracked[k]) for k, t in fedrot.aggregate(folders).tensors.items())


def test_integers_keep_their_digits(models):
    """Of float32, which has no 2^24 + 1, as of bfloat16."""
    (a, b), states = models
    large = torch.tensor([2**24 + 1, 3])
    for path, state in zip((a, b), states, strict=True):
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file({"head": state["lm_head.weight"], "large": large}, path / "model.safetensors")
    assert torch.equal(fedrot.aggregate([a, b]).tensors["large"], large)


def test_a_file_that_changes_while_it_is_read_is_refused(models):
    """Mapped, it would be another model from then on, under the SHA-256 of the first."""
    (a, b), _ = models
    for shard in b.glob("*.safetensors*"):
        shard.unlink()
    file = b / "model.safetensors"
    file.write_bytes((a / "model.safetensors").read_bytes())

    def track(items, label):
        if label == "averaging":
            file.write_bytes(file.read_bytes())
        return items

    with pytest.raises(FedrotError, match=f"{file}: changed while it was read"):
        fedrot.aggregate([a, b], track=track)


PEAK = """
import sys, threading
import fedrot.adapters.merge

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

fedrot.aggregate(sys.argv[4:]).save(sys.argv[1] + "-small")  # imports, threads
before, peak, done = private(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, private())
watcher = threading.Thread(target=watch)
watcher.start()
fedrot.aggregate(sys.argv[2:4]).save(sys.argv[1])
done.set()
watcher.join()
print(1024 * (peak - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_models_are_not_copied(tmp_path):
    """Beside the result and a few tensors in float64 (here 4 MB of 64) nothing is in memory."""
    layer = torch.ones(512, 512, dtype=torch.bfloat16)
    for name, count in (("a", 128), ("b", 128), ("c", 1), ("d", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        model = {f"{i}.weight": i * layer for i in range(count)}
        save_file(model, tmp_path / name / "model.safetensors")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    paths = [str(tmp_path / name) for name in ("out", *"abcd")]
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True
    )
    assert 0.9 * size < int(found.stdout) < 4 * size  # eleven times with copies
