"""`fedrot inspect`: layers, scalings, and misalignment, as a table and as JSON."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedrot.cli import app

A = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])


def write(path: Path, degrees: float, alpha: float = 4) -> Path:
    """One layer of rank 2 whose update is `alpha / 2 * B A`, in a basis turned by `degrees`."""
    angle = math.radians(degrees)
    Q = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["q"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.layers.0.q.lora_{}.weight"
    tensors = {key.format("A"): (Q.T @ A).contiguous(), key.format("B"): (B @ Q).contiguous()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def fedrot(*args, columns: int = 100):
    env = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def test_one_adapter(tmp_path):
    result = fedrot("inspect", write(tmp_path / "a", 0, alpha=3))
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "layers.0.q" in line)
    assert row.split() == ["layers.0.q", "2x3", "4x2", "2", "1.5", "float32"]
    assert "rotation" not in result.stdout


def test_misalignment_with_known_angles(tmp_path):
    """Turned by +60 and -60 degrees: plain averaging keeps cos(60)^2 of the update."""
    ref = write(tmp_path / "ref", 0)
    clients = [write(tmp_path / "p", 60), write(tmp_path / "m", -60)]
    result = fedrot("inspect", *clients, "--reference", ref, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [a["layers"][0]["scaling"] for a in report["adapters"]] == [2.0, 2.0]
    assert report["reference"] == str(ref)
    for client in clients:
        assert report["angles"][str(client)]["layers.0.q"] == pytest.approx(60, abs=1e-3)
    norm = 2 * math.sqrt(13)  # s ||B A||
    errors = report["errors"]["layers.0.q"]
    assert errors["norm"] == pytest.approx(norm, rel=1e-5)
    assert errors["plain"] == pytest.approx(0.75 * norm, rel=1e-5)
    assert errors["aligned"] == pytest.approx(0, abs=1e-5)
    assert errors["bound"] <= errors["aligned"] and "lam" not in errors
    assert report["summary"]["relative_plain"] == pytest.approx(0.75, rel=1e-5)

    half = json.loads(
        fedrot("inspect", *clients, "--reference", ref, "--lam", 0.5, "--json").stdout
    )
    # Half a rotation turns 60 degrees by 30: cos(30)^2 is kept.
    assert half["errors"]["layers.0.q"]["aligned"] == pytest.approx(0.25 * norm, rel=1e-4)

    best = json.loads(
        fedrot("inspect", *clients, "--reference", ref, "--lam", "auto", "--json").stdout
    )
    assert best["errors"]["layers.0.q"]["lam"] == 1.0


def test_tables_of_several(tmp_path):
    clients = [write(tmp_path / name, d, a) for name, d, a in (("a", 0, 4), ("b", 50, 8))]
    result = fedrot("inspect", *clients, "--weights", "3,1", columns=300)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert f"rotation from {clients[0]} (degrees)" in result.stdout
    table = result.stdout.split("rotation from")[1].split("aggregation error")[0]
    row = next(line for line in table.splitlines() if str(clients[1]) in line)
    assert row.split()[1:] == ["0.250", "50.0", "50.0"]
    assert lines[-2].split()[:2] == ["all", "25.0"]
    # Two layouts (the scalings differ), each adapter once.
    assert result.stdout.count("scaling") == 2


def test_bad_input_is_one_line(tmp_path):
    result = fedrot("inspect", tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"fedrot: {tmp_path / 'nowhere'}: no such folder\n"


def test_spectrum(tmp_path):
    """Both adapters are `2 diag(3, 2)` in bases of their own: squares 36 and 16 of 52."""
    clients = [write(tmp_path / "a", 0), write(tmp_path / "b", 50)]
    picture = tmp_path / "s.png"
    args = ("inspect", *clients, "--rank", "auto", "--energy", 0.69)
    result = fedrot(*args, "--plot", picture, columns=200)
    assert result.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = result.stdout.split("spectrum of the exact mean; to keep: 69 %")[1]
    row, total = (
        next(line.split() for line in table.splitlines() if name in line)
        for name in ("layers.0.q", "all ")
    )
    assert row == ["layers.0.q", "1", "69.2", "%", "69.2", "%", "█▆"]
    assert total == ["all", "69.2", "%", "69.2", "%"]
    assert "rotation from" in result.stdout

    report = json.loads(fedrot(*args, "--json").stdout)
    assert report["spectrum"]["kept"] == pytest.approx(36 / 52)
    layer = report["spectrum"]["layers"]["layers.0.q"]
    assert (layer["rank"], layer["kept"]) == (1, pytest.approx(36 / 52))
    assert layer["singular_values"] == pytest.approx([6, 4], rel=1e-5)
    assert report["errors"]["layers.0.q"]["aligned"] == pytest.approx(0, abs=1e-5)

    default = json.loads(fedrot("inspect", *clients, "--rank", "auto", "--json").stdout)
    assert default["spectrum"]["energy"] == 0.95
    assert default["spectrum"]["layers"]["layers.0.q"]["rank"] == 2


def test_spectrum_of_one_adapter_and_of_nothing(tmp_path):
    a = write(tmp_path / "a", 30)
    result = fedrot("inspect", a, "--rank", "auto", "--energy", 1, columns=200)
    row = next(line.split() for line in result.stdout.splitlines() if "█" in line)
    assert row == ["layers.0.q", "2", *("100.0", "%", "69.2", "%", "100.0", "%"), "█▆"]
    assert "rotation from" not in result.stdout

    tensors = load_file(a / "adapter_model.safetensors")
    save_file({k: 0 * t for k, t in tensors.items()}, a / "adapter_model.safetensors")
    picture = tmp_path / "s.png"
    result = fedrot("inspect", a, "--rank", "auto", "--plot", picture, columns=200)
    assert result.exit_code == 0 and picture.is_file()
    rows = [line.split() for line in result.stdout.splitlines() if "layers.0.q" in line]
    assert rows[-1] == ["layers.0.q", "1", "100.0", "%", "100.0", "%"]


def test_spectrum_on_a_narrow_terminal(tmp_path):
    """Names of layers come first, then columns; the bars and the larger ranks may be cut."""
    path, generator = tmp_path / "a", torch.Generator().manual_seed(0)
    path.mkdir()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.10.self_attn.q_proj"
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in (("A", (16, 32)), ("B", (32, 16)))
    }
    save_file(tensors, path / "adapter_model.safetensors")
    wanted = {80: ["1"], 100: ["1", "2", "4"], 200: ["1", "2", "4", "8", "16"]}
    bars = {80: 8, 100: 8, 200: 16}
    for columns, powers in wanted.items():
        result = fedrot("inspect", path, "--rank", "auto", columns=columns)
        table = result.stdout.split("spectrum of the exact mean")[1].splitlines()
        assert max(map(len, table)) <= columns
        header = next(line.split() for line in table if "layer" in line)
        shares = [word for n in powers for word in ("at", n)]
        assert header == ["layer", "rank", "kept", *shares, "values"]
        row = next(line.split() for line in table if "█" in line)
        assert (row[0], len(row[-1])) == (name, bars[columns])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--energy", 0.5), "--energy is for --rank auto, got --energy 0.5 without it"),
        (("--rank", 2, "--plot", "s.png"), "--plot is for --rank auto, got --plot s.png without"),
        (("--rank", 8), "--rank 8 pads a reference: there must be one, or two adapters"),
        (("--lam", 0), "--lam needs several adapters, or one and a reference"),
        (("--align", "A"), "--align needs several adapters, or one and a reference"),
        (("--weights", "1"), "--weights needs several adapters, or one and a reference"),
        (("--rank", "all"), "--rank must be a whole number or auto, got 'all'"),
        (("--rank", "auto", "--energy", 2), "--energy must be above 0 and at most 1, got 2.0"),
    ],
)
def test_bad_spectrum_options(tmp_path, options, message):
    result = fedrot("inspect", write(tmp_path / "a", 0), *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
