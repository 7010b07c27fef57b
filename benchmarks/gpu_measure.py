"""What ``gpu_suite`` measures: the card's ceilings, and configurations against plain PyTorch."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedrot.bench import baselines
from fedrot.bench.cases import (
    LLAMA_8B_LINEAR,
    LLAMA_8B_QV,
    ROBERTA_LARGE,
    Case,
    Factors,
    copies,
    factors,
)
from fedrot.bench.suites import verifier
from fedrot.report.markdown import table
from fedrot_kernels import align_aggregate


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def repeated(function: Callable[[], Any], times: int) -> Callable[[], Any]:
    """``function`` that many times in one graph."""

    def all_of_them() -> None:
        for _ in range(times):
            function()

    return captured(all_of_them).replay


def seconds_each(functions: list[Callable[[], Any]], device: str, aim: float = 0.3) -> float:
    """Median time of one call when ``functions`` are called in turn without waiting between."""

    def batch(count: int) -> float:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
        begin = time.perf_counter()
        for i in range(count):
            functions[i % len(functions)]()
        if device == "cuda":
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000 / count
        return (time.perf_counter() - begin) / count

    once = batch(len(functions))
    if once > 0.5:  # a baseline of thousands of calls
        return once
    count = max(1, min(200, round(aim / 7 / max(once, 1e-7))))
    return statistics.median(batch(count) for _ in range(7))


def waited(function: Callable[[], Any], device: str) -> float:
    """Median time from the call to its result on an idle device, host included."""
    samples = []
    for _ in range(30):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def ceilings(device: str, scale: float) -> dict[str, Any]:
    """What this card copies, reads, launches and multiplies."""
    big = int(scale * 2**30)
    source = torch.randn(big // 4, device=device)
    to = torch.empty_like(source)
    found: dict[str, Any] = {
        "copy": 2 * big / seconds_each([functools.partial(to.copy_, source)], device),
        "read": big / seconds_each([functools.partial(torch.sum, source)], device),
        "read by footprint": {},
    }
    for mebibytes in (4, 16, 32, 48, 64, 96, 128):
        part = source[: int(scale * mebibytes * 2**20) // 4]
        call = functools.partial(torch.sum, part)
        functions = (
            [call]
            if device == "cpu"
            else [captured(lambda c=call: [c() for _ in range(20)]).replay]
        )
        each = seconds_each(functions, device, 0.1) / (1 if device == "cpu" else 20)
        found["read by footprint"][f"{mebibytes} MiB"] = part.nbytes / each
    tiny = torch.zeros(1, device=device)
    found["launch"] = seconds_each([tiny.zero_], device, 0.05)
    if device == "cuda":
        found["launch in a graph"] = (
            seconds_each([captured(lambda: [tiny.zero_() for _ in range(100)]).replay], device)
            / 100
        )
    n = int(8192 * min(1.0, scale**0.5))
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        factors = torch.randn(2, n, n, device=device).to(dtype)
        call = functools.partial(torch.mm, factors[0], factors[1])
        found[f"{name} product"] = 2 * n**3 / seconds_each([call], device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def cases(tiny: bool) -> list[Case]:
    found = [
        Case("roberta-large-r4-n3", 3, 4, ROBERTA_LARGE),
        Case("roberta-large-r4-n100", 100, 4, ROBERTA_LARGE),
        Case("llama-8b-qv-r16-n10", 10, 16, LLAMA_8B_QV),
        Case("llama-8b-qv-r16-n100", 100, 16, LLAMA_8B_QV),
        Case("llama-8b-linear-r16-n10", 10, 16, LLAMA_8B_LINEAR),
        Case("llama-8b-linear-r64-n10", 10, 64, LLAMA_8B_LINEAR),
    ]
    found = [replace(case, dtype=torch.bfloat16, align="joint") for case in found]
    found.append(replace(found[2], dtype=torch.float32))
    if tiny:
        found = [replace(case, clients=2, shapes=((80, 72), (64, 72))) for case in found]
    return found


def measure(
    case: Case, device: str, backends: list[str], copy: float, left: Callable[[], float]
) -> dict[str, Any]:
    """One configuration: each backend's plan in a graph, called and waited for, and the operator;
    then plain PyTorch. Verified before it is timed."""
    cold = 2 * torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**20
    inputs = copies(factors(case, device), case.bytes, 2 * cold)
    outputs = case.bytes // case.clients
    row: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype_name,
        "bytes": case.bytes + outputs,
        "floor": (case.bytes + outputs) / copy,
        "times": {},
    }
    for backend in backends:
        try:
            measure_plan(case, device, backend, inputs, row["times"])
        except Exception as error:  # of one backend; the other and plain PyTorch are measured
            row.setdefault("failed", []).append(f"{backend}: {error}".splitlines()[0][:300])
    calls = {
        "operator": functools.partial(align_aggregate, **case.options),
        "stacked": functools.partial(baselines.stacked, **case.options),
        "per layer": functools.partial(baselines.per_layer, **case.options),
        "mean": baselines.mean,
        "foreach mean": baselines.foreach_mean,
    }
    if case.rank == 4 and baselines.compiler_missing() is None:
        calls["compiled"] = functools.partial(baselines.compiled(), **case.options)
    if case.clients * len(case.shapes) <= 3000:
        calls["loop"] = functools.partial(baselines.loop, **case.options)
    for name, call in calls.items():
        # torch decomposes larger matrices than 32 x 32 one after the other, for minutes.
        slow = name in ("stacked", "per layer", "loop") and case.rank > 32
        if left() < 60 or slow:
            row.setdefault("left out for time", []).append(name)
            continue
        few = 1 if name == "loop" else len(inputs)
        try:
            call(*inputs[0])
            row["times"][name] = seconds_each(
                [functools.partial(call, *given) for given in inputs[:few]], device, 0.02
            )
        except Exception as error:
            row.setdefault("failed", []).append(f"{name}: {error}".splitlines()[0][:300])
    return row


def measure_plan(
    case: Case, device: str, backend: str, inputs: list[Factors], times: dict[str, float]
) -> None:
    """Adds the times of a backend's plan: in a graph, called, and waited for."""
    module = importlib.import_module(f"fedrot_kernels.backends.{backend}")
    runners = []
    for given in inputs:
        A, B = [torch.empty_like(t) for t in given[2]], [torch.empty_like(t) for t in given[3]]
        runners.append(module.Runner(tuple(given), None, A, B, case.lam, case.align, True))
    runners[0].run()
    verifier(case, inputs[0], backend)(module.align_aggregate(*inputs[0], **case.options))
    runs = [runner.run for runner in runners]
    if device == "cuda":
        replays = [captured(run).replay for run in runs]
        times[f"{backend} graph"] = seconds_each(replays, device)
    times[f"{backend} plan"] = seconds_each(runs, device)
    times[f"{backend} plan, waited for"] = waited(runs[0], device)


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"# {machine.get('gpu', machine['cpu'])}",
        "",
        f"{machine['date']}, torch {machine['torch']}, commit {machine['commit']}",
        "",
    ]
    for backend, found in result.get("checks", {}).items():
        lines.append(
            f"- checks, {backend}: {found['passed']} passed, {len(found['failed'])} failed, "
            f"{found['left out']} left out"
        )
    for name, found in result.get("sanitizer", {}).items():
        lines.append(f"- compute-sanitizer, {name}: {found.splitlines()[0] if found else ''}")
    lines += [f"- failed: {line}" for line in result.get("failures", [])]
    if "ceilings" in result:
        found = result["ceilings"]
        lines += [
            "",
            f"Copy {found['copy'] / 1e12:.2f} TB/s, read {found['read'] / 1e12:.2f} TB/s, "
            f"launch {found['launch'] * 1e6:.1f} us, bf16 {found['bf16 product'] / 1e12:.0f} "
            f"and TF32 {found['tf32 product'] / 1e12:.0f} TFLOP/s.",
        ]
    for row in result.get("cases", []):
        best = min(
            (t for name, t in row["times"].items() if "graph" in name or "plan" in name),
            default=None,
        )
        lines += ["", f"## {row['case']}, {row['dtype']}: floor {row['floor'] * 1e6:.0f} us", ""]
        body = [
            [name, f"{t * 1e6:.1f}", f"{row['floor'] / t:.2f}", f"{t / best:.1f}x" if best else ""]
            for name, t in row["times"].items()
        ]
        lines.append(table(("form", "us", "of the floor", "times the best plan"), body))
    return "\n".join(lines) + "\n"
