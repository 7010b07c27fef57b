"""One run of ``fedrot bench``: what to measure, the measurement, and its files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedrot.bench import baselines, machine, pictures, suites
from fedrot.bench.cases import SHORT, Case, select, sweeps
from fedrot.bench.floor import Limits
from fedrot.files import new_file, write_json
from fedrot.tasks.base import Track
from fedrot_kernels.ops import ALIGN_MODES, DTYPES

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
SHORT_COLD = 512 * 2**20  # bytes; filling more takes the short mode too long


@dataclass(frozen=True)
class Plan:
    """``seconds`` a row; only the cases where some were named, everything else otherwise."""

    short: bool
    cases: list[Case]  # once for each dtype
    aligns: list[str]
    only_cases: bool
    threads: int
    device: str

    @property
    def seconds(self) -> float:
        return 1.5 if self.short else 15.0


def plan(
    *,
    short: bool = False,
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    aligns: Sequence[str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Plan:
    """``None`` is the mode's own choice.

    Raises:
        ValueError: a case, dtype, alignment or device is unknown, or the device is not there.
    """
    dtypes = dtypes or (["float32"] if short else ["float32", "bfloat16"])
    aligns = aligns or (["A"] if short else ["A", "joint"])
    for name, values, known in (("dtype", dtypes, DTYPE_NAMES), ("align", aligns, ALIGN_MODES)):
        for value in values:
            if value not in known:
                raise ValueError(f"{name} must be of {', '.join(known)}; got {value!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds none here")
    chosen = select(cases if cases is not None else SHORT if short else None)
    return Plan(
        short=short,
        cases=[case.of(DTYPE_NAMES[dtype]) for dtype in dtypes for case in chosen],
        aligns=list(aligns),
        only_cases=cases is not None,
        threads=threads or machine.cores(),
        device=device,
    )


def measure(plan: Plan, track: Track) -> dict[str, Any]:
    """Run everything in ``plan``; plain numbers, as they go into the JSON file."""
    began = time.monotonic()
    cold = machine.cold_bytes(plan.device)
    if plan.short:
        cold = min(cold, SHORT_COLD)
    bench = suites.Bench(plan.device, plan.threads, plan.seconds, cold, Limits(plan.device, cold))
    missing = "left out of the short mode" if plan.short else baselines.compiler_missing()
    result: dict[str, Any] = {
        "machine": machine.describe(plan.device, plan.threads),
        "short": plan.short,
        "not_compiled": missing,
        "cases": suites.cases(bench, plan.cases, plan.aligns, missing is None, track),
    }
    if not plan.only_cases:
        plain = [case for case in plan.cases if case.dtype == plan.cases[0].dtype]
        result["stages"] = suites.stages(bench, plain[:: 3 if plan.short else 1], track)
        result["scaling"] = suites.scaling(bench, sweeps(plan.short), track)
        if not plan.short:
            result["threads"] = suites.threads(bench, plain, track)
            result["polar"] = suites.polar(bench, track)
            result["truncation"] = suites.truncation(bench, track)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON and pictures; their names say what kind of machine it was."""
    folder.mkdir(parents=True, exist_ok=True)
    name = machine.kind(result["machine"]) + ("-short" if result["short"] else "")
    paths = [folder / f"{name}.json"]
    write_json(paths[0], result)
    for label, png in pictures.draw(result).items():
        paths.append(folder / f"{name}-{label}.png")
        with new_file(paths[-1]) as fresh:
            fresh.write_bytes(png)
    return paths
