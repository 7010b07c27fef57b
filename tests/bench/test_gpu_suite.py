"""The GPU suite without a GPU: it runs through, and its files say what it found."""

from __future__ import annotations

import json

import gpu_checks
import pytest
import torch

from benchmarks import gpu_measure, gpu_suite
from fedrot.bench import baselines


def one_call(functions, *rest):
    functions[0]()
    return 1e-3


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(baselines, "compiler_missing", lambda: "not in this test")
    monkeypatch.setattr(gpu_measure, "seconds_each", one_call)
    few = [c for c in gpu_checks.checks(full=False) if c[0].startswith(("polar", "weights"))]
    monkeypatch.setattr(gpu_checks, "checks", lambda full: few)
    one = [c for c in gpu_checks.block_checks(full=False) if c[0].startswith("blocks of one")]
    monkeypatch.setattr(gpu_checks, "block_checks", lambda full: one)


def test_it_runs_through(quick, tmp_path, capsys):
    code = gpu_suite.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert (code, result["failures"]) == (0, [])
    assert result["checks"]["cpu"]["passed"] == 4 and result["checks"]["cpu"]["failed"] == []
    assert {"copy", "read", "launch", "bf16 product"} <= set(result["ceilings"])
    names = [(row["case"], row["dtype"]) for row in result["cases"]]
    assert len(names) == 7 and ("llama-8b-qv-r16-n10", "float32") in names
    for row in result["cases"]:
        assert {"cpu plan", "operator", "stacked", "per layer", "mean", "loop"} <= set(row["times"])
    text = file.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "- checks, cpu:" in text and "## llama-8b-linear-r64-n10, bfloat16" in text


def test_a_wrong_kernel_is_found_and_the_rest_goes_on(quick, tmp_path, monkeypatch):
    from fedrot_kernels.backends import cpu

    right = cpu.polar
    monkeypatch.setattr(cpu, "polar", lambda M, **options: -right(M, **options))
    code = gpu_suite.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert code == 1
    failed = result["checks"]["cpu"]["failed"]
    assert failed and all("polar" in line for line in failed)
    assert result["failures"] == [f"cpu: {line}" for line in failed]
    assert len(result["cases"]) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
