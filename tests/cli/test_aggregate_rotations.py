"""`fedrot aggregate`: the `lam` it chose, the least error possible, and `--rotation shifted`."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedrot.cli import app

KEY = "base_model.model.{}.lora_{}.weight"
SCALING = 2.0


def write(path: Path, layers: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """`layers`: `A` and `B` by name, of one rank."""
    r = next(iter(layers.values()))[0].shape[0]
    path.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": SCALING * r, "target_modules": [*layers]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        KEY.format(name, side): t.contiguous()
        for name, factors in layers.items()
        for side, t in zip("AB", factors, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def read(path: Path, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(path / "adapter_model.safetensors")
    A, B = (tensors[KEY.format(layer, side)].double() for side in "AB")
    return A, B


def draw(seed: int, r: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, 5, generator=g), torch.randn(6, r, generator=g)


def turned(factors, degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = factors
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    Q = torch.tensor([[c, -s], [s, c]])
    return Q.T @ A, B @ Q


def fedrot(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def line(stdout: str, name: str) -> str:
    (found,) = (row for row in stdout.splitlines() if row.startswith(f"{name} "))
    return found.removeprefix(name).strip()


def provenance(folder: Path) -> dict:
    return json.loads((folder / "fedrot_provenance.json").read_text())


@pytest.fixture
def strangers(tmp_path):
    """Two adapters of two layers that share nothing."""
    return [
        write(tmp_path / name, {"q": draw(seed), "v": draw(seed + 10)})
        for seed, name in enumerate(("a", "b"))
    ]


def test_the_lam_of_every_layer(tmp_path):
    """q: one update in two bases, where the whole rotation loses nothing. v: the same B, so the
    plain average loses nothing, but A turned by 90 degrees, to which the rotation is fitted."""
    q, v = draw(1), draw(2)
    a = write(tmp_path / "a", {"q": q, "v": v})
    b = write(tmp_path / "b", {"q": turned(q, 100), "v": (0.5 * turned(v, 90)[0], v[1])})
    out = tmp_path / "out"
    args = ("aggregate", a, b, "-o", out, "--align", "A", "--force")
    code, stdout, stderr = fedrot(*args, "--lam", "auto")
    assert (code, stderr) == (0, "")
    errors = provenance(out)["errors"]
    assert {name: layer["lam"] for name, layer in errors.items()} == {"q": 1.0, "v": 0.0}
    assert line(stdout, "lam, as chosen") == "median 0.5, 0 to 1 over 2 layers"

    code, stdout, _ = fedrot(*args, "--lam", "auto-client")
    chosen = [layer["lam"] for layer in provenance(out)["errors"].values()]
    assert [len(lam) for lam in chosen] == [2, 2]
    assert chosen[0][1] == 1.0 and chosen[1][1] == 0.0  # the client that is not the reference
    assert line(stdout, "lam, as chosen").endswith("over 2 layers and 2 clients")
    nobody = write(tmp_path / "c", {"q": v, "v": q})
    _, stdout, _ = fedrot(
        *args[:3], nobody, *args[3:], "--lam", "auto-client", "--weights", "1,1,0"
    )
    assert line(stdout, "lam, as chosen").endswith("over 2 layers and 2 clients")  # nobody's third

    code, stdout, _ = fedrot(*args, "--lam", 0.5)
    assert "lam, as chosen" not in stdout and "lam" not in provenance(out)["errors"]["q"]


@pytest.mark.parametrize("options", [("--align", "optimal"), ("--lam", 0), ("--rule", "median")])
def test_the_least_error_possible(strangers, tmp_path, options):
    """That of the singular values beyond the rank; what is lost is more, and with `--rule exact`
    as much."""
    out, least = tmp_path / "out", {}
    code, stdout, _ = fedrot("aggregate", *strangers, "-o", out, *options)
    assert code == 0
    errors, summary = provenance(out)["errors"], provenance(out)["measured"]
    for name in ("q", "v"):
        D = sum(SCALING * B @ A / 2 for A, B in (read(folder, name) for folder in strangers))
        S = torch.linalg.svdvals(D)
        least[name] = float(S[2:].norm())
        assert errors[name]["bound"] == pytest.approx(least[name], rel=1e-5)
        assert errors[name]["norm"] == pytest.approx(float(S.norm()), rel=1e-5)
        assert errors[name]["aligned"] > 1.01 * least[name] > 0.1
    assert summary["error_bound"] == pytest.approx(math.hypot(*least.values()), rel=1e-5)
    share = summary["error_bound"] / summary["norm"]
    assert summary["relative_bound"] == pytest.approx(share)
    text = f"{summary['error_bound']:.4g} ({100 * share:.2g} %), of any adapter of this rank"
    assert line(stdout, "error, least possible") == text

    code, stdout, _ = fedrot("aggregate", *strangers, "-o", out, "--rule", "exact", "--force")
    assert code == 0 and "error, least possible" not in stdout
    exact = provenance(out)["errors"]
    for name, bound in least.items():
        assert exact[name]["aligned"] == pytest.approx(bound, rel=1e-4)
        assert exact[name]["bound"] == pytest.approx(bound, rel=1e-5)


def test_a_bound_in_the_rounding_is_below_the_error(tmp_path):
    """One update in two bases has the rank of the result: nothing but rounding must be lost."""
    q = draw(1)
    folders = [write(tmp_path / f"{i}", {"q": turned(q, 80 * i)}) for i in range(3)]
    assert fedrot("aggregate", *folders, "-o", tmp_path / "out")[0] == 0
    layer = provenance(tmp_path / "out")["errors"]["q"]
    assert layer["bound"] <= layer["aligned"] < 1e-6 * layer["norm"]


@pytest.mark.parametrize(("align", "eps"), [("joint", None), ("A", 0.5)])
def test_shifted(strangers, tmp_path, align, eps):
    """`polar(M + eps |M| I)` by an SVD in float64."""
    out = tmp_path / "out"
    given = () if eps is None else ("--eps", eps)
    args = ("--rotation", "shifted", "--align", align, "--improper", *given)
    code, stdout, _ = fedrot("aggregate", *strangers, "-o", out, *args)
    assert code == 0
    eps = 0.03 if eps is None else eps
    assert f"shifted, eps {eps:g}, align {align}" in line(stdout, "error, FedRot-LoRA")
    assert provenance(out)["method"] == {
        "name": "FedRot-LoRA",
        "align": align,
        "proper": False,
        "rotation": "shifted",
        "lag": 1,
        "eps": eps,
    }
    for name in ("q", "v"):
        ref_A, ref_B = read(strangers[0], name)
        A, B = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
        for folder in strangers:
            own_A, own_B = read(folder, name)
            M = own_A @ ref_A.T + (own_B.T @ ref_B if align == "joint" else 0)
            shift = eps * M.norm() * torch.eye(2, dtype=torch.float64)
            U, _, Vh = torch.linalg.svd(M + shift)
            A += (U @ Vh).T @ own_A / 2
            B += own_B @ U @ Vh / 2
        got_A, got_B = read(out, name)
        torch.testing.assert_close(got_A, A, rtol=0, atol=1e-5)
        torch.testing.assert_close(got_B, B, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eps", 0.1), "--eps is for --rotation shifted, got --eps 0.1 without it"),
        (
            ("--rotation", "shifted", "--lam", 0.5),
            "--rotation shifted has --eps in the place of --lam, got --lam 0.5",
        ),
        (
            ("--rotation", "shifted", "--lam", "auto"),
            "--rotation shifted has --eps in the place of --lam, got --lam auto",
        ),
        (
            ("--rotation", "shifted", "--align", "gpa"),
            "--rotation shifted is fitted to the reference: --align must be joint, A or B, got gpa",
        ),
        (
            ("--rotation", "shifted", "--rule", "median"),
            "--rotation shifted is for --rule mean, got --rule median",
        ),
        (
            ("--rotation", "shifted", "--rank", "auto"),
            "--rotation shifted is for --rule mean, got --rule exact",
        ),
        (("--rotation", "shifted", "--eps", -1), "--eps must be finite and not negative, got -1.0"),
        (
            ("--rotation", "shifted", "--eps", "nan"),
            "--eps must be finite and not negative, got nan",
        ),
    ],
)
def test_refused(strangers, tmp_path, options, message):
    out = tmp_path / "out"
    code, stdout, stderr = fedrot("aggregate", *strangers, "-o", out, *options)
    assert (code, stdout, stderr) == (1, "", f"fedrot: {message}\n")
    assert not out.exists()


def test_exact_factors_too_small_or_large_for_float32(tmp_path):
    """Squares of 1e-25 are no float32: the result is not the least possible, and is not called
    so. Products of 1e30 are none either."""
    scaled = {
        scale: [
            write(
                tmp_path / f"{scale}-{seed}",
                {"q": (scale * draw(seed)[0], scale * draw(seed)[1])},
            )
            for seed in (0, 1)
        ]
        for scale in (1.0, 1e-25, 1e30)
    }
    out = tmp_path / "out"
    args = ("-o", out, "--force", "--rule", "exact")
    _, stdout, _ = fedrot("aggregate", *scaled[1.0], *args)
    assert line(stdout, "error, FlexLoRA").endswith("%), the least of any adapter of this rank")
    assert "least possible" not in stdout
    _, stdout, _ = fedrot("aggregate", *scaled[1e-25], *args)
    assert line(stdout, "error, FlexLoRA").endswith("(100 %)")
    assert line(stdout, "error, least possible").endswith("%), of any adapter of this rank")
    for rank in ((), ("--rank", 3)):
        code, _, stderr = fedrot("aggregate", *scaled[1e30], *args, *rank)
        assert code == 1 and stderr.startswith("fedrot: ") and "overflows its dtype" in stderr
    assert "layer 'q'" in stderr
