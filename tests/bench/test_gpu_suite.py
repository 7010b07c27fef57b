"""The GPU suite without a GPU: it runs through, and its files say what it found."""

from __future__ import annotations

import json
import sys

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


@pytest.fixture
def few(monkeypatch):
    few = [c for c in gpu_checks.checks(full=False) if c[0].startswith(("polar", "weights"))]
    monkeypatch.setattr(gpu_checks, "checks", lambda full: few)
    one = [c for c in gpu_checks.block_checks(full=False) if c[0].startswith("blocks of one")]
    monkeypatch.setattr(gpu_checks, "block_checks", lambda full: one)


def test_it_runs_through(quick, tmp_path, capsys):
    code = gpu_suite.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert (code, result["failures"]) == (0, [])
    names = [name for name, _ in gpu_suite.selected("cpu", "cpu", full=False)]
    assert (
        result["checks"] == {"cpu, small": {"passed": len(names), "failed": [], "left out": 0}}
        and len(names) > 30
    )
    assert {"copy", "read", "launch", "bf16 product"} <= set(result["ceilings"])
    names = [(row["case"], row["dtype"]) for row in result["cases"]]
    assert len(names) == 7 and ("llama-8b-qv-r16-n10", "float32") in names
    for row in result["cases"]:
        assert {"cpu plan", "operator", "mean", "foreach mean"} <= set(row["times"])
        if "r64" not in row["case"]:
            assert {"stacked", "per layer", "loop"} <= set(row["times"])
    text = file.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "- checks, cpu, small:" in text and "## llama-8b-linear-r64-n10, bfloat16" in text


def test_a_wrong_kernel_is_found_and_the_rest_goes_on(few, monkeypatch, capsys):
    from fedrot_kernels.backends import cpu

    right = cpu.polar
    monkeypatch.setattr(cpu, "polar", lambda M, **options: -right(M, **options))
    assert gpu_suite.run_checks("cpu", "cpu", False, "0/1", 60) == gpu_suite.CHECKS_FAILED
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = {line["check"]: line["error"] for line in lines}
    assert len(errors) == 4 and {n for n, e in errors.items() if not e} == {
        "weights",
        "blocks of one client",
    }
    assert all("\n" not in error for error in errors.values())


def test_shares_are_all_checks(few, capsys):
    names = [name for name, _ in gpu_suite.selected("cpu", "cpu", full=False)]
    for share in ("0/3", "1/3", "2/3"):
        assert gpu_suite.run_checks("cpu", "cpu", False, share, 60) == 0
    ran = [json.loads(line)["check"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(ran) == sorted(names) and len(ran) == 4


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        ("print(found('weights')); sys.exit(0)", []),
        ("print(found('weights', 'wrong')); sys.exit(3)", ["weights: wrong"]),
        (
            "print(found('weights')); sys.exit('sticky')",
            ["a process died (1) after weights: sticky"],
        ),
        (
            "print(found('weights'), flush=True); os.kill(os.getpid(), 9)",
            ["a process died (-9) after weights"],
        ),
        (
            "print(found('weights'), flush=True); time.sleep(60)",
            ["a process did not end after weights"],
        ),
    ],
)
def test_what_becomes_of_a_process_of_checks(few, monkeypatch, script, failed):
    start, wait = gpu_suite._start, gpu_suite._wait
    head = (
        "import json, os, sys, time\n"
        "found = lambda name, error='': json.dumps({'check': name, 'error': error})\n"
    )
    monkeypatch.setattr(
        gpu_suite,
        "_start",
        lambda command, **to: start([sys.executable, "-c", head + script], **to),
    )
    monkeypatch.setattr(gpu_suite, "_wait", lambda process, seconds: wait(process, 5))
    report = gpu_suite.Report(60)
    gpu_suite.check(report, "cpu", "cpu", False, 1, 1)
    found = report.result["checks"]["cpu, small"]
    assert found == {
        "passed": 0 if failed == ["weights: wrong"] else 1,
        "failed": failed,
        "left out": 3,
    }
    assert report.failures == [f"cpu, small: {line}" for line in failed]


def test_what_was_found_is_written_after_every_part(tmp_path):
    report, saved = gpu_suite.Report(60), []
    report.save = lambda: saved.append(dict(report.result))
    with report.part("one"):
        report.result["ceilings"] = 1
    with report.part("two"):
        raise ValueError("bad\nand more")
    assert len(saved) == 2
    assert report.failures == ["two: ValueError: bad"] and saved[1]["ceilings"] == 1


def test_a_form_that_fails_costs_no_other(monkeypatch):
    monkeypatch.setattr(gpu_measure, "seconds_each", one_call)
    monkeypatch.setattr(baselines, "compiler_missing", lambda: "not in this test")

    def broken(*given, **options):
        raise RuntimeError("broken\nfor good")

    monkeypatch.setattr(baselines, "stacked", broken)
    case = gpu_measure.cases(tiny=True)[0]
    row = gpu_measure.measure(case, "cpu", ["nothing", "cpu"], 1e9, lambda: 500)
    assert {"cpu plan", "per layer", "mean"} <= set(row["times"]) and "stacked" not in row["times"]
    assert [line.split(":")[0] for line in row["failed"]] == ["nothing", "stacked"]
    large = gpu_measure.cases(tiny=True)[5]
    row = gpu_measure.measure(large, "cpu", ["cpu"], 1e9, lambda: 500)
    assert large.rank == 64 and row["left out for time"] == ["stacked", "per layer", "loop"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
