"""`fedrot aggregate` on folders: what it writes, what it says, what it refuses."""

import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedrot.cli import app
from fedrot.cli.aggregate import error_text

KEY_A = "base_model.model.q.lora_A.weight"
KEY_B = "base_model.model.q.lora_B.weight"


def write(path: Path, seed: int, r: int = 2, **config) -> Path:
    gen = torch.Generator().manual_seed(seed)
    path.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q"], **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {KEY_A: torch.randn(r, 5, generator=gen), KEY_B: torch.randn(6, r, generator=gen)}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def fedrot(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def clients(tmp_path):
    return write(tmp_path / "a", 1), write(tmp_path / "b", 2)


def test_writes_the_merged_adapter_and_where_it_came_from(clients, tmp_path):
    a, b = clients
    samples = tmp_path / "samples.json"
    samples.write_text('{"b": 30, "a": 10}')
    out = tmp_path / "merged"
    args = ("aggregate", a, b, "-o", out, "--weights", samples, "--lam", 0)
    code, stdout, stderr = fedrot(*args)
    assert (code, stderr) == (0, "")
    assert f"reference             {a} (the first client" in stdout
    assert "1 of rank 2" in stdout and str(out) in stdout
    for key in (KEY_A, KEY_B):
        expected = 0.25 * read(a)[key] + 0.75 * read(b)[key]
        torch.testing.assert_close(read(out)[key], expected)

    provenance = json.loads((out / "fedrot_provenance.json").read_text())
    assert provenance["method"] == {
        "name": "FedRot-LoRA",
        "lam": 0.0,
        "align": "joint",
        "proper": True,
        "rotation": "procrustes",
        "lag": 1,
    }
    assert [c["weight"] for c in provenance["clients"]] == [0.25, 0.75]
    sha = hashlib.sha256((b / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert provenance["clients"][1]["sha256"]["adapter_model.safetensors"] == sha
    assert provenance["reference"]["path"] == str(a)
    assert provenance["measured"]["error_plain"] == provenance["measured"]["error_aligned"] > 0


def test_whole_rotation_is_the_default_and_recovers_a_rotated_adapter(clients, tmp_path):
    a, _ = clients
    c, s = torch.cos(torch.tensor(2.0)), torch.sin(torch.tensor(2.0))
    Q = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    turned = write(tmp_path / "turned", 3)
    tensors = {KEY_A: Q.T @ read(a)[KEY_A], KEY_B: read(a)[KEY_B] @ Q}
    save_file({k: v.contiguous() for k, v in tensors.items()}, turned / "adapter_model.safetensors")
    out = tmp_path / "merged"
    code, stdout, _ = fedrot("aggregate", a, turned, "--reference", a, "-o", out)
    assert code == 0
    for key in (KEY_A, KEY_B):
        torch.testing.assert_close(read(out)[key], read(a)[key], rtol=0, atol=1e-5)
    # Client a is turned by 0, the other by 2 rad = 114.6 degrees: 57.3 in the mean.
    assert "57.3 degrees" in stdout
    assert "(the first client" not in stdout


def test_says_when_aligning_loses_more_than_plain_averaging(clients, tmp_path):
    """Same B, and A turned by 180 degrees: aligned on A alone, the two B cancel."""
    a, b = clients
    tensors = {KEY_A: -0.01 * read(a)[KEY_A], KEY_B: read(a)[KEY_B]}
    save_file(tensors, b / "adapter_model.safetensors")
    _, _, stderr = fedrot("aggregate", a, b, "-o", tmp_path / "m", "--align", "A")
    assert "note: aligning increased the error" in stderr
    summary = json.loads((tmp_path / "m" / "fedrot_provenance.json").read_text())["measured"]
    assert summary["relative_plain"] == pytest.approx(0, abs=1e-6)
    assert summary["relative_aligned"] == pytest.approx(1, rel=1e-6)
    # One client alone loses nothing but rounding, and nothing is said.
    assert fedrot("aggregate", b, "--reference", a, "-o", tmp_path / "o")[2] == ""


def test_optimal_loses_least_and_the_reference_only_gives_the_basis(tmp_path):
    """Errors fall from joint to gpa to optimal; lam auto is not above 0 or 1."""
    folders = [write(tmp_path / name, seed) for seed, name in enumerate("abcd")]
    out, errors = tmp_path / "merged", {}
    for align in ("joint", "gpa", "optimal"):
        for lam in ("0", "1", "auto"):
            args = ("aggregate", *folders, "-o", out, "--force", "--align", align, "--lam", lam)
            code, stdout, _ = fedrot(*args)
            assert code == 0 and f"lam {lam}, align {align}" in stdout
            provenance = json.loads((out / "fedrot_provenance.json").read_text())
            assert provenance["method"]["align"] == align
            errors[align, lam] = provenance["measured"]["error_aligned"]
        least = min(errors[align, "0"], errors[align, "1"])
        assert errors[align, "auto"] <= least * (1 + 1e-5)
    assert errors["optimal", "1"] <= errors["gpa", "1"] * (1 + 1e-5)
    assert errors["optimal", "1"] < 0.9 * errors["joint", "1"]


def test_quiet_and_force(clients, tmp_path):
    out = tmp_path / "merged"
    assert fedrot("aggregate", *clients, "-o", out, "--quiet") == (0, "", "")
    before = read(out)[KEY_A]
    code, stdout, stderr = fedrot("aggregate", *clients, "-o", out)
    assert (code, stdout) == (1, "")
    assert stderr == f"fedrot: {out} exists; --force replaces it\n"
    assert fedrot("aggregate", *clients, "-o", out, "--force", "-q", "--lam", 0)[0] == 0
    assert not torch.equal(read(out)[KEY_A], before)


def test_rank_lets_a_larger_client_in(clients, tmp_path):
    big = write(tmp_path / "big", 3, r=3)
    out = tmp_path / "merged"
    code, _, stderr = fedrot("aggregate", clients[0], big, "-o", out)
    assert code == 1 and "(--rank 3) pads the reference" in stderr and not out.exists()
    assert fedrot("aggregate", clients[0], big, "-o", out, "--rank", 3)[0] == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)  # the scaling stays 4 / 2
    assert read(out)[KEY_A].shape == (3, 5)


def test_other_base_model_is_said_on_stderr(clients, tmp_path):
    other = write(tmp_path / "other", 3, base_model_name_or_path="gpt2")
    code, _, stderr = fedrot("aggregate", clients[0], other, "-o", tmp_path / "merged", "-q")
    assert code == 0
    assert stderr.startswith(f"note: {other}: base_model_name_or_path is 'gpt2'")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "b", "-o", "a", "--force"], "would replace the input"),
        (["a", "a", "-o", "out"], "is given twice"),
        (["a", "nowhere", "-o", "out"], "nowhere: no such folder"),
        (["a", "b", "-o", "out", "--weights", "1"], "1 values for 2 adapters"),
        (["a", "b", "-o", "out", "--weights", "0,0"], "not all zero"),
        (["a", "b", "-o", "out", "--lam", "1.5"], "lam must lie in [0, 1], got 1.5"),
        (["a", "b", "-o", "out", "--lam", "half"], "lam must be a number or auto, got 'half'"),
        (["a", "b", "-o", "out", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["a", "b", "-o", "out", "--rank", "1000000"], "--rank must be at most 5, the full rank"),
        (
            ["a", "b", "-o", "out", "--rank", "1"],
            "--rank must be at least 2, that of the reference, got 1",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(clients, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, stdout, stderr = fedrot("aggregate", *args)
    assert (code, stdout) == (1, "")
    assert message in stderr and stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ((), "mean"),
        (("--rule", "median"), "median"),
        (("--rule", "clip"), "clip"),
        (("--rule", "exact"), "exact"),
        (("--rank", "auto"), "exact"),
    ],
)
def test_attackers_of_a_rule_that_counts_none(clients, tmp_path, options, rule):
    out = tmp_path / "merged"
    for count in (1, 2):  # also the number that the other rules take by themselves
        code, stdout, stderr = fedrot(
            "aggregate", *clients, "-o", out, "--attackers", count, *options
        )
        assert (code, stdout) == (1, "") and not out.exists()
        assert stderr == (
            f"fedrot: --attackers {count} is for --rule trimmed, krum, multi-krum; "
            f"--rule {rule} has no such number\n"
        )


def test_attackers_count(tmp_path):
    """Of 1, 2, 4, 9 and 100 times one product: the mean of the middle three, or the middle one."""
    folders = []
    for i, factor in enumerate((1.0, 2.0, 4.0, 9.0, 100.0)):
        folder = write(tmp_path / f"{i}", 1)
        tensors = read(folder)
        save_file(tensors | {KEY_B: factor * tensors[KEY_B]}, folder / "adapter_model.safetensors")
        folders.append(folder)
    one = read(folders[0])
    for options, factor in (((), 5.0), (("--attackers", 1), 5.0), (("--attackers", 2), 4.0)):
        out = tmp_path / "out"
        args = ("--reference", folders[0], "--rule", "trimmed", *options, "--force")
        assert fedrot("aggregate", *folders, "-o", out, *args)[0] == 0
        torch.testing.assert_close(read(out)[KEY_B], factor * one[KEY_B])


def test_a_full_disk_is_one_line_and_leaves_nothing(clients, tmp_path):
    """safetensors has an error of its own for it; and the temporary name is nobody's business."""
    out = tmp_path / "merged"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, stdout, stderr = fedrot("aggregate", *clients, "-o", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, stdout) == (1, "")
    assert stderr == f"fedrot: {out}: File too large\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

    (tmp_path / "file").touch()
    code, _, stderr = fedrot("aggregate", *clients, "-o", tmp_path / "file" / "merged")
    assert code == 1
    assert stderr == f"fedrot: {tmp_path / 'file' / 'merged'}: Not a directory\n"


def test_error_text():
    assert error_text(0.12345, 0.0449) == "0.1235 (4.5 %)"
    assert error_text(4.2, 1.062) == "4.2 (106 %)"
    assert error_text(0.0, None) == "0"


def test_a_robust_rule_leaves_out_the_bad_one(tmp_path):
    good = write(tmp_path / "a", 1)
    folders = [good]
    for name, factor in (("b", 1.0), ("c", 1.0), ("d", 1.0), ("bad", -50.0)):
        folder = write(tmp_path / name, 1)
        tensors = {key: t.clone() for key, t in read(good).items()}
        tensors[KEY_B] *= factor
        save_file(tensors, folder / "adapter_model.safetensors")
        folders.append(folder)
    out = tmp_path / "merged"
    args = ("aggregate", *folders, "-o", out, "--reference", good)
    for rule in ("median", "krum", "multi-krum"):
        code, stdout, _ = fedrot(*args, "--rule", rule, "--force")
        assert code == 0 and f"{rule}, lam 1, align joint" in stdout
        assert "error, Robust FedRot-LoRA " in stdout
        product = read(out)[KEY_B] @ read(out)[KEY_A]
        torch.testing.assert_close(product, read(good)[KEY_B] @ read(good)[KEY_A])
    made = json.loads((out / "fedrot_provenance.json").read_text())["method"]
    assert made["rule"] == "multi-krum" and made["proper"] is False
    assert fedrot(*args, "--rule", "median", "--proper", "--force")[0] == 0
    made = json.loads((out / "fedrot_provenance.json").read_text())["method"]
    assert made["rule"] == "median" and made["proper"] is True
    # The change of the bad one is cut to the length asked for; the others do not change.
    moved = (read(folders[-1])[KEY_B] - read(good)[KEY_B]).norm()
    code, _, stderr = fedrot(*args, "--rule", "clip", "--bound", 0.01 * float(moved), "--force")
    assert (code, stderr) == (0, "")
    change = (read(out)[KEY_B] - read(good)[KEY_B]).norm()
    assert 0 < change <= 0.01 * moved / 5 * 1.001
    huge = {key: t.sign() * 1e38 for key, t in read(good).items()}  # is measured, too
    save_file(huge, folders[-1] / "adapter_model.safetensors")
    assert fedrot(*args, "--rule", "median", "--force")[0] == 0
    product = read(out)[KEY_B] @ read(out)[KEY_A]
    torch.testing.assert_close(product, read(good)[KEY_B] @ read(good)[KEY_A])
    weights = ("--weights", "1,2,1,1,0", "--force")
    _, _, stderr = fedrot(*args, "--rule", "median", *weights)
    assert stderr == "note: --rule median gives one vote to every adapter of a weight above 0\n"
    assert fedrot(*args, "--rule", "clip", *weights)[2] == ""
    assert fedrot(*args, "--rule", "median", "--weights", "1,1,1,1,0", "--force")[2] == ""
    code, _, stderr = fedrot(*args, "--rule", "median", "--bound", 2, "--force")
    assert code == 1 and "--bound 2 is for --rule clip, got --rule median" in stderr
    for bound, message in ((-1, "above 0, got -1"), (0, "above 0, got 0"), ("inf", "finite")):
        code, _, stderr = fedrot(*args, "--rule", "clip", "--bound", bound, "--force")
        assert code == 1 and f"--bound must be {message}" in stderr
    code, _, stderr = fedrot(*args, "--rule", "trimmed", "--attackers", 3, "--force")
    assert code == 1 and "needs at least 7 clients, got 5" in stderr
    code, _, stderr = fedrot(*args, "--rule", "median", "--lam", "auto", "--force")
    assert code == 1 and "lam must be a number" in stderr


def test_rank_by_energy(tmp_path):
    """Clients of rank 4 and 2 become the truncation of their mean that holds the share."""
    clients = [write(tmp_path / "a", 1, r=4), write(tmp_path / "b", 2)]
    D = sum(
        s * read(c)[KEY_B].double() @ read(c)[KEY_A].double()
        for c, s in zip(clients, (0.25 * 1, 0.75 * 2), strict=True)
    )
    U, S, Vh = torch.linalg.svd(D)
    held = (S.square().cumsum(0) / S.square().sum()).tolist()
    energy = (held[1] + held[2]) / 2  # between rank 2 and rank 3
    out = tmp_path / "merged"
    args = ("--weights", "1,3", "--rank", "auto", "--energy", energy)
    code, stdout, stderr = fedrot("aggregate", *clients, "-o", out, *args)
    assert (code, stderr) == (0, "")
    assert "1 of rank 3" in stdout
    kept, asked = f"{100 * held[2]:.4g} %", f"{100 * energy:.4g} %"
    assert f"energy kept           {kept}, at least {asked} in each layer" in stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)  # the scaling of the first client, 1
    got = read(out)[KEY_B].double() @ read(out)[KEY_A].double()
    torch.testing.assert_close(got, (U[:, :3] * S[:3]) @ Vh[:3], rtol=0, atol=1e-5)
    provenance = json.loads((out / "fedrot_provenance.json").read_text())
    assert provenance["method"] == {"name": "FlexLoRA", "gauge": "reference"}
    assert provenance["ranks"] == [3]
    assert provenance["spectrum"] == {
        "energy": energy,
        "kept": pytest.approx(held[2]),
        "ranks": {"q": 3},
    }

    same = tmp_path / "same"
    args = ("--weights", "1,3", "--rank", 3, "--rule", "exact")
    assert fedrot("aggregate", *clients, "-o", same, *args)[0] == 0
    assert all(torch.equal(read(same)[key], read(out)[key]) for key in (KEY_A, KEY_B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "auto", "--rule", "mean"), "which --rule exact alone gives, got --rule mean"),
        (("--rank", "auto", "--rule", "median"), "--rule exact alone gives, got --rule median"),
        (("--rank", "auto", "--lam", 0.5), "--rule exact has none"),
        (("--rule", "exact", "--align", "A"), "--rule exact has none"),
        (("--rule", "exact", "--improper"), "--rule exact has none"),
        (("--energy", 0.5), "--energy must go with rank='auto', got energy=0.5 and rank=None"),
        (("--rank", "2.5"), "--rank must be a whole number or auto, got '2.5'"),
        (("--rank", "auto", "--energy", 0), "--energy must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_rank_options(clients, tmp_path, options, message):
    out = tmp_path / "merged"
    code, stdout, stderr = fedrot("aggregate", *clients, "-o", out, *options)
    assert (code, stdout) == (1, "")
    assert message in stderr
    assert not out.exists()
