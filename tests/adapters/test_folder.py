"""Folders: what is refused on reading, and that writing is all or nothing."""

import json
from pathlib import Path

import pytest
import torch

import fedrot
from fedrot.adapters import check_output, folder, gather, read_adapter, write_adapter
from fedrot.errors import FedrotError
from fedrot.files import _swap_in

A = "base_model.model.lin1.lora_A.weight"
B = "base_model.model.lin1.lora_B.weight"


def with_nan(state):
    state[A][1, 2] = float("nan")
    return state


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def extra(key, value):
    return lambda state: {**state, key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, f"'{A}' has non-finite values"),
        (without(B), "layer 'lin1' has no factor B"),
        (extra("base_model.model.lin1.lora_diag", torch.ones(4)), "unknown key .*lora_diag"),
        (extra("base_model.model.lin1.weight", torch.ones(4)), "unknown key .*lin1.weight"),
        (extra(A, torch.ones(3, 8)), r"A of shape \(3, 8\), but the configuration gives .* rank 4"),
        (extra(B, torch.ones(9, 3)), r"B of shape \(9, 3\), but A of shape \(4, 8\)"),
        (extra(B, torch.ones(9, 2, 1, 1)), "grouped convolution"),
        (extra(B, torch.ones(0)), "not gathered before saving"),
        (extra(A, torch.ones(4, 8, dtype=torch.int8)), "torch.int8, which cannot be averaged"),
        (lambda state: {"base_model.model.head.bias": torch.ones(3)}, "unknown key|no LoRA"),
    ],
)
def test_bad_tensors_are_named(save, tools, change, message):
    path = save("a", 1)
    tools.rewrite(path, change)
    with pytest.raises(FedrotError, match=message) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(str(path))


def test_missing_and_corrupt_files(save, tmp_path):
    with pytest.raises(FedrotError, match=r"nowhere: no such folder"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedrotError, match=r"adapter_config.json is missing"):
        read_adapter(tmp_path / "empty")
    path = save("a", 1)
    weights, config = path / folder.WEIGHTS, path / folder.CONFIG
    whole = weights.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"not safetensors"):
        weights.write_bytes(part)
        with pytest.raises(FedrotError, match="corrupt or not a safetensors file"):
            read_adapter(path)
    weights.rename(path / folder.PICKLED_WEIGHTS)
    with pytest.raises(FedrotError, match=r"only adapter_model.bin, a pickle"):
        read_adapter(path)
    (path / folder.PICKLED_WEIGHTS).unlink()
    with pytest.raises(FedrotError, match=r"adapter_model.safetensors is missing"):
        read_adapter(path)
    for text, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        config.write_text(text)
        with pytest.raises(FedrotError, match=message):
            read_adapter(path)


def test_adapters_that_do_not_fit_together(save):
    a = save("a", 1)
    cases = [
        (save("b", 2, target_modules=["lin1"]), r"b: other layers .* lacks .*lin2.lora_A"),
        (save("c", 2, target_modules=["lin1", "lin2", "conv"]), r"c: .* has in addition .*conv"),
        (save("d", 2, bias="lora_only"), r"d: bias is 'lora_only', .* has 'none'"),
    ]
    for path, message in cases:
        with pytest.raises(FedrotError, match=message):
            gather([read_adapter(a), read_adapter(path)], read_adapter(a))


def test_other_shapes_are_refused(save, tools):
    a, b = save("a", 1), save("b", 2)
    tools.rewrite(b, extra(A, torch.ones(4, 5)))
    with pytest.raises(FedrotError, match=r"lora_A.weight' has shape \(4, 5\), .* has \(4, 8\)"):
        gather([read_adapter(b)], read_adapter(a))


def test_other_base_model_is_noted(save):
    a, b = save("a", 1), save("b", 2)
    config = json.loads((b / folder.CONFIG).read_text())
    (b / folder.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "other"}))
    notes = gather([read_adapter(a), read_adapter(b)], read_adapter(a)).notes
    assert len(notes) == 1 and "base_model_name_or_path is 'other'" in notes[0]


@pytest.mark.parametrize(
    "weights", [[1.0], [1, -1], [0, 0], [1, float("nan")], [1, None], ["a", 1]]
)
def test_bad_weights(save, weights):
    read = [read_adapter(save("a", 1)), read_adapter(save("b", 2))]
    with pytest.raises(FedrotError, match="weights"):
        gather(read, read[0], weights)


def test_weights_whose_sum_overflows(save):
    read = [read_adapter(save("a", 1)), read_adapter(save("b", 2))]
    assert gather(read, read[0], [1.5e308, 0.5e308]).weights.tolist() == [0.75, 0.25]


def test_write_is_all_or_nothing(save, tmp_path, monkeypatch):
    adapter = read_adapter(save("a", 1))
    output = tmp_path / "deep" / "out"
    write_adapter(output, adapter.config, adapter.tensors, {"n": 1})
    again = read_adapter(output)
    assert again.config == adapter.config
    assert all(torch.equal(again.tensors[k], v) for k, v in adapter.tensors.items())
    assert len({p.stat().st_mode for p in output.iterdir()}) == 1
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert json.loads(before[folder.PROVENANCE]) == {"n": 1}

    with pytest.raises(TypeError):  # a provenance that JSON cannot hold: after the tensors
        write_adapter(output, adapter.config, adapter.tensors, {"n": object()})

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk on fire")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk on fire"):
        write_adapter(output, adapter.config, adapter.tensors, {"n": 2})
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert [p.name for p in output.parent.iterdir()] == ["out"]

    write_adapter(output, adapter.config, adapter.tensors, {"n": 2})
    assert json.loads((output / folder.PROVENANCE).read_text()) == {"n": 2}
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_the_old_folder_stays_where_the_new_one_cannot_be_put(tmp_path):
    old = tmp_path / "adapter"
    old.mkdir()
    (old / "weights").touch()
    with pytest.raises(FileNotFoundError):
        _swap_in(tmp_path / "missing", old, tmp_path / "aside")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (old / "weights").exists()


def test_the_reference_is_not_replaced_by_what_was_aligned_to_it(save):
    a, ref = save("a", 1), save("ref", 2)
    merged = fedrot.aggregate([a], ref)
    with pytest.raises(FedrotError, match=r"the output would replace the input .*ref"):
        merged.save(ref, force=True)


def test_output_must_not_destroy_anything(save, tmp_path):
    a, b = save("a", 1), save("b", 2)
    check_output(tmp_path / "new", [a], force=False)
    with pytest.raises(FedrotError, match="would replace the input"):
        check_output(a / ".." / "a", [a], force=True)
    with pytest.raises(FedrotError, match="would replace the input"):
        check_output(tmp_path, [a], force=True)
    with pytest.raises(FedrotError, match="--force"):
        check_output(b, [a], force=False)
    check_output(b, [a], force=True)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FedrotError, match="not an adapter folder"):
        check_output(tmp_path / "photos", [a], force=True)
    (tmp_path / "link").symlink_to(b)
    with pytest.raises(FedrotError, match="not an adapter folder"):
        check_output(tmp_path / "link", [a], force=True)
