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
from fedrot.files import write_bytes, write_json
from fedrot.progress import Track
from fedrot_kernels.checks import ALIGN_MODES, DTYPES

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
SHORT_COLD = 512 * 2**20  # bytes; filling more takes the short mode too long


@dataclass(frozen=True)
class Plan:
    """``selection``: someone chose among cases, dtypes or alignments; nothing else is measured."""

    short: bool
    selection: bool
    cases: list[Case]  # once for each dtype
    aligns: list[str]
    threads: int
    device: str

    @property
    def seconds(self) -> float:
        """The aim for one row."""
        return 1.5 if self.short else 8.0

    @property
    def mode(self) -> str:
        return "short" if self.short else "selection" if self.selection else "full"


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
    selection = not (cases is None and dtypes is None and aligns is None)
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
        selection=selection,
        cases=[case.of(DTYPE_NAMES[dtype]) for dtype in dtypes for case in chosen],
        aligns=list(aligns),
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
        "mode": plan.mode,
        "not_compiled": missing,
        "cases": suites.cases(bench, plan.cases, plan.aligns, missing is None, track),
    }
    if not plan.selection:
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
    """Write JSON and pictures. Their names say what kind of machine it was, and the mode unless
    it was the full one, so that a smaller run does not replace a full one."""
    folder.mkdir(parents=True, exist_ok=True)
    name = machine.kind(result["machine"])
    if result["mode"] != "full":
        name += f"-{result['mode']}"
    paths = [folder / f"{name}.json"]
    write_json(paths[0], result)
    for label, png in pictures.draw(result).items():
        paths.append(folder / f"{name}-{label}.png")
        write_bytes(paths[-1], png)
    return paths
