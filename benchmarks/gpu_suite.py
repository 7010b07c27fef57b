"""Everything that has to be seen on a GPU, in one run of under ten minutes and without a network:

    python -m benchmarks.gpu_suite            # or: make gpu

Builds the native module if it is not there, checks the CUDA and the Triton backend against the
float64 reference (``tests/kernels/gpu_checks.py``), runs compute-sanitizer where it is installed,
captures plans in CUDA graphs, and then measures: the card's ceilings first, then the
configurations of ``gpu_measure.cases``. Writes ``benchmarks/results/gpu/<card>.json`` and ``.md``.
A part that fails is reported and the rest goes on; the exit code is 1 if any did.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "kernels")]

BACKENDS = ("cuda", "triton")
SECONDS = 570  # of the whole run; parts that would begin later are left out and said so


class Report:
    """What was found, as it goes into the files; ``failures`` says what did not hold."""

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.seconds = seconds
        self.result: dict[str, Any] = {}
        self.failures: list[str] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        print(f"[{time.monotonic() - self.began:4.0f} s] {name}", flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])


def build() -> None:
    """Install the package where its CUDA module is missing but nvcc is there."""
    if importlib.util.find_spec("fedrot_kernels") and importlib.util.find_spec(
        "fedrot_kernels._cuda"
    ):
        return
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "--editable", str(ROOT)], check=True)
    importlib.invalidate_caches()


def check(report: Report, backend: str, device: str, full: bool) -> None:
    """Every check of ``gpu_checks`` for what the backend has, as far as there is time."""
    from gpu_checks import NAN_ON_A_GPU, block_checks, checks

    module = importlib.import_module(f"fedrot_kernels.backends.{backend}")
    passed, left_out, failed = 0, 0, []
    until = report.left() - 0.35 * report.seconds  # leaves a third of the run to what follows
    begin = time.monotonic()
    for name, function in [
        *checks(full),
        *(block_checks(full) if hasattr(module, "gram") else ()),
    ]:
        if device == "cpu" and name.startswith(NAN_ON_A_GPU):
            continue
        if time.monotonic() - begin > until:
            left_out += 1
            continue
        try:
            function(module, device)
            passed += 1
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    found = {"passed": passed, "failed": failed, "left out": left_out}
    report.result.setdefault("checks", {})[backend] = found
    report.failures += [f"{backend}: {line}" for line in failed]
    print(f"  {backend}: {passed} passed, {len(failed)} failed, {left_out} left out for time")


def sanitize(report: Report) -> None:
    """The small checks of the CUDA backend under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    found = report.result["sanitizer"] = {}
    if tool is None:
        found["left out"] = "compute-sanitizer is not installed"
        return
    for name in ("memcheck", "racecheck"):
        script = [sys.executable, "-m", "benchmarks.gpu_suite", "--only-checks", "cuda"]
        command = [tool, "--tool", name, "--error-exitcode", "9", *script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=75, cwd=ROOT)
        except subprocess.TimeoutExpired:
            found[name] = "did not end within 75 seconds"
            continue
        found[name] = "clean" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-500:]
        if done.returncode:
            report.failures.append(f"compute-sanitizer {name}")


def graphs(backend: str) -> None:
    """A captured plan gives the plan's bits, follows its inputs, weights and flat buffers."""
    from problems import planted

    from benchmarks import gpu_measure
    from fedrot_kernels.plan import Flat

    module = importlib.import_module(f"fedrot_kernels.backends.{backend}")
    shapes = [(700, 900, 16), (300, 200, 16)]
    refs = planted(1, shapes).map(lambda t: t.cuda())
    weights = torch.ones(3, device="cuda")
    sizes = [size for d, k, r in shapes for size in (r * k, d * r)]
    starts = [sum(sizes[:i]) for i in range(4)]
    flat = Flat([], [(starts[0], starts[1]), (starts[2], starts[3])], shapes)

    def fresh(seed: int) -> list[torch.Tensor]:
        inputs = planted(3, shapes, seed=seed).map(lambda t: t.cuda())
        pairs = list(zip(inputs.lora_A, inputs.lora_B, strict=True))
        return [
            torch.cat([t.flatten() for pair in pairs[2 * i : 2 * i + 2] for t in pair])
            for i in range(3)
        ]

    flat.buffers = fresh(0)
    A, B = [torch.empty_like(t) for t in refs.ref_A], [torch.empty_like(t) for t in refs.ref_B]
    factors = (*flat.factors(), refs.ref_A, refs.ref_B)
    runner = module.Runner(factors, weights, A, B, 0.4, "joint", True, flat)
    graph = gpu_measure.captured(runner.run)
    for seed in (1, 2):
        flat.buffers = fresh(seed)
        runner.rebind()
        weights.copy_(torch.tensor([1.0, float(seed), 0.5]))
        for out in [*A, *B]:
            out.fill_(torch.nan)
        graph.replay()
        wanted = module.align_aggregate(*flat.factors(), refs.ref_A, refs.ref_B, weights)
        for out, expected in zip([*A, *B], [*wanted[0], *wanted[1]], strict=True):
            assert torch.equal(out, expected), "a replay gives other bits"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--tiny", action="store_true", help="sizes that measure nothing")
    parser.add_argument("--only-checks", metavar="BACKEND", help="the small checks, nothing else")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    report = Report(SECONDS)
    if options.only_checks:
        check(report, options.only_checks, device, full=False)
        return 1 if report.failures else 0

    backends = ["cpu"] if device == "cpu" else []
    if device == "cuda":
        with report.part("build"):
            build()
        for backend in BACKENDS:
            with report.part(f"{backend} backend"):
                importlib.import_module(f"fedrot_kernels.backends.{backend}")
                backends.append(backend)
    from benchmarks import gpu_measure
    from fedrot.bench import machine
    from fedrot.files import write_json, write_text

    report.result["machine"] = machine.describe(device, machine.cores())
    for backend in backends:
        with report.part(f"checks: {backend}"):
            check(report, backend, device, full=not options.tiny)
        if device == "cuda":
            with report.part(f"graphs: {backend}"):
                graphs(backend)
    if "cuda" in backends:
        with report.part("compute-sanitizer"):
            sanitize(report)
    with report.part("ceilings"):
        report.result["ceilings"] = gpu_measure.ceilings(device, 0.001 if options.tiny else 1.0)
    rows = report.result["cases"] = []
    for case in gpu_measure.cases(options.tiny) if "ceilings" in report.result else []:
        with report.part(f"{case.name} {case.dtype_name}"):
            if report.left() < 30:
                raise TimeoutError("left out for time")
            copy = report.result["ceilings"]["copy"]
            rows.append(gpu_measure.measure(case, device, backends, copy, report.left))
    report.result["failures"] = report.failures
    report.result["seconds"] = round(time.monotonic() - report.began)

    text = gpu_measure.markdown(report.result)
    options.output.mkdir(parents=True, exist_ok=True)
    name = machine.kind(report.result["machine"])
    write_json(options.output / f"{name}.json", report.result)
    write_text(options.output / f"{name}.md", text)
    print(f"\n{text}\nwritten  {options.output / name}.json, .md")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
