"""Everything that has to be seen on a GPU, in one run of under ten minutes and without a network:

    python -m benchmarks.gpu_suite            # or: make gpu

Installs the package if its CUDA module is not there, checks the CUDA and the Triton backend against
the float64 reference (``tests/kernels/gpu_checks.py``), captures plans in CUDA graphs, measures the
card's ceilings and then the configurations of ``gpu_measure.cases``, and runs compute-sanitizer,
where it is installed, and the rest of the checks. Writes ``benchmarks/results/gpu/<card>.json`` and
``.md``, again after every part: whatever ends the run, what was found is there. A part that fails
is reported and the rest goes on; the exit code is 1 if any did.

Checks run in processes of their own, since an illegal address ends all work on the GPU of the
process that made it, and several at a time, since nearly all of a check is compiling.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "kernels")]

BACKENDS = ("cuda", "triton")
SECONDS = 570  # of the whole run; parts that would begin later are left out and said so
CHECKS_FAILED = 3  # the exit code then; 1 is Python's own
INSTALLED = "FEDROT_GPU_SUITE_INSTALLED"  # set in the process that begins after the installation


class Report:
    """What was found, as it goes into the files; ``failures`` says what did not hold."""

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.seconds = seconds
        self.result: dict[str, Any] = {}
        self.failures: list[str] = []
        self.save: Callable[[], None] = lambda: None

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        print(f"[{time.monotonic() - self.began:4.0f} s] {name}", flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {summary(error)}")
        self.result["failures"] = self.failures
        self.result["seconds"] = round(time.monotonic() - self.began)
        self.save()


def summary(error: Exception) -> str:
    """In one line: a compiler's error may have hundreds."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def install(arguments: list[str]) -> None:
    """Where the CUDA module is missing, install the package with it, and begin again: what is
    installed into a folder of sources is found by the next process alone."""
    if os.environ.get(INSTALLED) or _has_cuda_module():
        return
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}a" if major == 9 else f"{major}{minor}"
    settings = {"FEDROT_CUDA": "ON", "FEDROT_CUDA_ARCHITECTURES": architecture}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    for name, value in settings.items():
        command += ["--config-settings", f"cmake.define.{name}={value}"]
    environment = {**os.environ, "CUDACXX": nvcc}
    done = subprocess.run([*command, "--quiet", "--editable", str(ROOT)], env=environment)
    if done.returncode:
        print("the package could not be installed; the run goes on with what is there")
    again = [sys.executable, "-m", "benchmarks.gpu_suite", *arguments]
    os.chdir(ROOT)
    os.execve(sys.executable, again, {**os.environ, INSTALLED: "1"})


def _has_cuda_module() -> bool:
    try:
        files = importlib.metadata.files("fedrot") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(file.name == "_cuda.so" for file in files)


def selected(backend: str, device: str, full: bool) -> list[tuple[str, Any]]:
    """The checks of what the backend has; those that take longest to compile come last."""
    from gpu_checks import NAN_ON_A_GPU, block_checks, checks

    module = importlib.import_module(f"fedrot_kernels.backends.{backend}")
    found = [*checks(full), *(block_checks(full) if hasattr(module, "gram") else ())]
    if device == "cpu":
        found = [check for check in found if not check[0].startswith(NAN_ON_A_GPU)]
    return sorted(found, key=lambda check: check[0].endswith(("r128", "r200", "r256")))


def run_checks(backend: str, device: str, full: bool, share: str, seconds: float) -> int:
    """A share ``i/n`` of the checks in this process: a line of JSON each on the standard output."""
    index, of = map(int, share.split("/"))
    module = importlib.import_module(f"fedrot_kernels.backends.{backend}")
    began, failed = time.monotonic(), 0
    for name, function in selected(backend, device, full)[index::of]:
        if time.monotonic() - began > seconds:
            break
        error = ""
        try:
            function(module, device)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as found:
            error, failed = summary(found), failed + 1
        print(json.dumps({"check": name, "error": error}), flush=True)
    return CHECKS_FAILED if failed else 0


def check(
    report: Report, backend: str, device: str, full: bool, seconds: float, processes: int
) -> None:
    """The checks of a backend in so many processes. What one that dies, or does not end, had not
    done yet is left out, and is a failure unless the time was up."""
    names = [name for name, _ in selected(backend, device, full)]
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--only-checks", backend]
    command += ["--device", device, "--seconds", str(seconds), *(["--full"] if full else [])]
    grid = "full" if full else "small"
    lines: list[dict[str, str]] = []
    died = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(i) for i in range(processes)]
        started = []
        for i, output in enumerate(outputs):
            with output.open("wb") as file, output.with_suffix(".err").open("wb") as errors:
                arguments = [*command, "--share", f"{i}/{processes}"]
                started.append(_start(arguments, stdout=file, stderr=errors))
        until = time.monotonic() + seconds + 60  # for the check at hand to end
        for i, process in enumerate(started):
            code = _wait(process, until - time.monotonic())
            found = [json.loads(line) for line in outputs[i].read_text().splitlines()]
            lines += found
            if code not in (0, CHECKS_FAILED):
                after = found[-1]["check"] if found else "its start"
                how = "did not end" if code is None else f"died ({code})"
                said = outputs[i].with_suffix(".err").read_text(errors="replace").splitlines()
                last = f": {said[-1][:200]}" if said else ""
                died.append(f"a process {how} after {after}{last}")
    failed = [f"{line['check']}: {line['error']}" for line in lines if line["error"]]
    found_here = {
        "passed": len(lines) - len(failed),
        "failed": [*failed, *died],
        "left out": len(names) - len(lines),
    }
    report.result.setdefault("checks", {})[f"{backend}, {grid}"] = found_here
    report.failures += [f"{backend}, {grid}: {line}" for line in found_here["failed"]]
    counts = (
        f"{found_here['passed']} passed, {len(failed)} failed, {found_here['left out']} left out"
    )
    print(f"  {backend}, {grid}: {counts}", flush=True)


def _start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """In a session of its own, so that all that it starts can be ended with it."""
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; or ``None`` after the time, when everything of the process is killed."""
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def sanitize(report: Report) -> None:
    """The small checks of the CUDA backend under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    found = report.result["sanitizer"] = {}
    if tool is None:
        found["left out"] = "compute-sanitizer is not installed"
        return
    for name in ("memcheck", "racecheck"):
        seconds = min(75.0, report.left() - 10)
        if seconds < 30:
            found[name] = "left out for time"
            continue
        script = [sys.executable, "-m", "benchmarks.gpu_suite", "--only-checks", "cuda"]
        options = ["--error-exitcode", "9", "--report-api-errors", "no"]
        command = [tool, "--tool", name, *options, *script, "--seconds", str(seconds)]
        # Without torch's cache every tensor is an allocation, beyond which memcheck sees.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with tempfile.TemporaryFile("w+") as output:
            process = _start(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            code = _wait(process, seconds)
            output.seek(0)
            text = output.read()
        if code is None:
            found[name] = f"did not end within {seconds:.0f} seconds"
        elif code == 0:
            found[name] = "clean"
        else:
            found[name] = text[-2500:]
            if "not supported" not in text:  # some containers do not let it at the device
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--only-checks", metavar="BACKEND", help="the checks, a line each")
    parser.add_argument("--share", default="0/1", help="which of them, as 2/8")
    parser.add_argument("--full", action="store_true", help="all of them, not the small grid")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    if options.only_checks:
        return run_checks(options.only_checks, device, options.full, options.share, options.seconds)
    if device == "cuda":
        options.output = options.output.resolve()
        install(sys.argv[1:] if arguments is None else arguments)

    from benchmarks import gpu_measure
    from fedrot.bench import machine
    from fedrot.files import write_json, write_text

    report = Report(options.seconds)
    report.result["machine"] = machine.describe(device, machine.cores())
    file = options.output / machine.kind(report.result["machine"])
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_json(file.with_name(f"{file.name}.json"), report.result)
        write_text(file.with_name(f"{file.name}.md"), gpu_measure.markdown(report.result))

    report.save = save
    backends = ["cpu"] if device == "cpu" else []
    for backend in BACKENDS if device == "cuda" else ():
        with report.part(f"{backend} backend"):
            importlib.import_module(f"fedrot_kernels.backends.{backend}")
            backends.append(backend)
    processes = 1 if options.tiny else max(1, min(12, machine.cores() - 2))
    # First what the measurements rest on; what takes longest to compile has what time is left.
    for backend in backends:
        full = backend == "cuda"
        with report.part(f"checks: {backend}, {'full' if full else 'small'}"):
            check(report, backend, device, full, report.left() / 4, processes)
        if device == "cuda":
            with report.part(f"graphs: {backend}"):
                graphs(backend)
    with report.part("ceilings"):
        report.result["ceilings"] = gpu_measure.ceilings(device, 0.001 if options.tiny else 1.0)
    rows = report.result["cases"] = []
    for case in gpu_measure.cases(options.tiny) if "ceilings" in report.result else []:
        with report.part(f"{case.name} {case.dtype_name}"):
            if report.left() < 60:
                raise TimeoutError("left out for time")
            copy = report.result["ceilings"]["copy"]
            row = gpu_measure.measure(case, device, backends, copy, report.left)
            rows.append(row)
            report.failures += [
                f"{case.name} {case.dtype_name}: {line}" for line in row.get("failed", [])
            ]
    if "cuda" in backends:
        with report.part("compute-sanitizer"):
            sanitize(report)
    if "triton" in backends and report.left() > 100:
        with report.part("checks: triton, full"):
            check(report, "triton", device, True, report.left() - 70, processes)
    print(f"\n{gpu_measure.markdown(report.result)}\nwritten  {file}.json, .md")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
