"""What is measured. Every suite returns plain numbers, one entry a row of its table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fedrot_kernels
from fedrot.bench import baselines
from fedrot.bench.cases import Case, Factors, copies, factors
from fedrot.bench.floor import Limits, floor
from fedrot.bench.timing import Form, Timing, measure
from fedrot.progress import Track
from fedrot_kernels import rspace
from fedrot_kernels.backends import reference

Row = dict[str, Any]
Sweeps = Mapping[str, Sequence[tuple[str, Case]]]

# Relative to the largest entry of the expected tensor; outputs are rounded to their dtype once.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-9,
}
POLAR_RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
TRUNCATIONS = (
    *(Case(f"1024-r4-n{n}", n, 4, ((1024, 1024),)) for n in (2, 10, 50, 100, 200, 300)),
    Case("4096x1024-r16-n10", 10, 16, ((4096, 1024),)),
)


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure.

    ``seconds`` is the aim for one row; ``cold`` the bytes of input that calls take turns on.
    """

    device: str
    threads: int
    seconds: float
    cold: int
    limits: Limits

    def measure(self, forms: Sequence[Form], seconds: float | None = None) -> dict[str, Timing]:
        """Time ``forms`` in turns with the machine's limits among them."""
        return measure(forms, self.device, self.seconds if seconds is None else seconds)


def cases(
    bench: Bench, chosen: Sequence[Case], aligns: Sequence[str], compile: bool, track: Track
) -> list[Row]:
    """The operator against every baseline, a row for each case and alignment."""
    rows = []
    for case in track(chosen, "cases"):
        inputs = copies(factors(case, bench.device), case.bytes, bench.cold)
        for align in aligns:
            rows.append(_against_baselines(bench, replace(case, align=align), inputs, compile))
    return rows


def operator_forms(case: Case, compile: bool) -> dict[str, Callable[..., baselines.Means]]:
    """The operator and its baselines by name, all with the arguments of one case."""
    aligned: dict[str, Callable[..., baselines.Means]] = {
        "fedrot": fedrot_kernels.align_aggregate,
        "loop": baselines.loop,
        "stacked": baselines.stacked,
        "per_layer": baselines.per_layer,
    }
    if compile:
        aligned["compiled"] = baselines.compiled()
    forms: dict[str, Callable[..., baselines.Means]] = {
        name: functools.partial(form, **case.options) for name, form in aligned.items()
    }
    forms["mean"] = baselines.mean
    if case.dtype.itemsize >= 4:
        forms["foreach_mean"] = baselines.foreach_mean  # too inexact in narrow dtypes
    return forms


def verifier(case: Case, inputs: Factors, form: str) -> Callable[[baselines.Means], None]:
    """A check of one form's result on ``inputs`` against the float64 reference, on the first
    layer of each shape. Raises RuntimeError."""
    layers = [case.shapes.index(shape) for shape in dict.fromkeys(case.shapes)]
    count = len(case.shapes)
    lora_A, lora_B, ref_A, ref_B = inputs
    chosen = [i * count + layer for i in range(case.clients) for layer in layers]
    plain = form in ("mean", "foreach_mean")

    def verify(result: baselines.Means) -> None:
        expected = reference.align_aggregate(
            [lora_A[i].cpu() for i in chosen],
            [lora_B[i].cpu() for i in chosen],
            [ref_A[layer].cpu() for layer in layers],
            [ref_B[layer].cpu() for layer in layers],
            lam=0.0 if plain else case.lam,
            align=case.align,
        )
        for side, wanted in zip(result, expected, strict=True):
            for layer, want in zip(layers, wanted, strict=True):
                check_close(f"{form} in {case.name}", side[layer].cpu(), want, case.dtype)

    return verify


def check_close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError where ``actual`` is off by more than its dtype allows."""
    expected = expected.double()
    off = float((actual.double() - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE[dtype]:
        raise RuntimeError(f"{what} is off by {off:.1e} of the largest entry; not timed")


def _against_baselines(bench: Bench, case: Case, inputs: Sequence[Factors], compile: bool) -> Row:
    forms = bench.limits.forms(bench.threads)
    for name, function in operator_forms(case, compile).items():
        verify = verifier(case, inputs[0], name)
        forms.append(Form(name, function, inputs, bench.threads, verify))
    plans = [(fedrot_kernels.Plan(*given, **case.options),) for given in inputs]
    verify = verifier(case, inputs[0], "plan")
    forms.append(Form("plan", fedrot_kernels.Plan.__call__, plans, bench.threads, verify))
    timings = bench.measure(forms)
    return _row(case, timings, bench.limits.rates(timings, bench.threads))


def _row(case: Case, timings: dict[str, Timing], rates: dict[str, float]) -> Row:
    """The numbers of one case: its size, its floor, and every form's time."""
    return {
        "case": case.name,
        "dtype": case.dtype_name,
        "align": case.align,
        "lam": case.lam,
        "clients": case.clients,
        "rank": case.rank,
        "layers": len(case.shapes),
        "bytes": case.bytes,
        "flops": case.flops,
        **rates,
        "floor": floor(case.bytes, case.flops, rates),
        "times": {name: t.as_dict() for name, t in timings.items() if "@" not in name},
    }


def stages(bench: Bench, chosen: Sequence[Case], track: Track) -> list[Row]:
    """Covariance, polar factor, soft rotation and apply of each case, joint alignment (where
    nothing is read that the computation does not need).

    Only whole operators can be called: ``polar`` is the operator of that name on the case's own
    ``M``, and ``soft`` on the ``(1 - lam) I + lam R`` that follow; ``covariance`` is
    ``align(lam=1)`` less ``polar``; ``apply`` is ``align_aggregate(lam=0)``. They need not sum to
    the whole, which reads the factors the second time from cache. ``svd`` is ``torch.linalg.svd``
    on ``M``.
    """
    rows = []
    for case in track([replace(case, align="joint") for case in chosen], "stages"):
        inputs = copies(factors(case, bench.device), case.bytes, bench.cold)
        forms = stage_forms(case, inputs)
        timings = bench.measure(
            [
                Form(name, function, given, bench.threads)
                for name, (function, given) in forms.items()
            ]
        )
        seconds = {name: timing.median for name, timing in timings.items()}
        rows.append(
            {
                "case": case.name,
                "dtype": case.dtype_name,
                "align": case.align,
                "whole": seconds["whole"],
                "covariance": seconds["align"] - seconds["polar"],
                "polar": seconds["polar"],
                "soft": seconds["soft"],
                "apply": seconds["apply"],
                "svd": seconds["svd"],
            }
        )
    return rows


def stage_forms(
    case: Case, inputs: Sequence[Factors]
) -> dict[str, tuple[Callable[..., Any], Sequence[Any]]]:
    """The operators of :func:`stages` by name, each with its inputs."""
    M = cross_covariance(case, inputs[0])
    lam, aggregate = case.options["lam"], fedrot_kernels.align_aggregate
    polar = functools.partial(fedrot_kernels.polar, proper=True)
    blend = lam * polar(M) + (1 - lam) * torch.eye(case.rank, dtype=M.dtype, device=M.device)
    return {
        "whole": (functools.partial(aggregate, **case.options), inputs),
        "align": (functools.partial(fedrot_kernels.align, lam=1.0, align=case.align), inputs),
        "apply": (functools.partial(aggregate, lam=0.0), inputs),
        "polar": (polar, [(M,)]),
        "soft": (polar, [(blend,)]),
        "svd": (torch.linalg.svd, [(M,)]),
    }


def cross_covariance(case: Case, inputs: Factors) -> Tensor:
    """``M`` of every client and layer, ``(N L, r, r)`` in float32 (float64 for float64)."""
    lora_A, lora_B, ref_A, ref_B = inputs
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    layers = len(ref_A)
    found = []
    for index, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        M = torch.zeros(case.rank, case.rank, dtype=dtype, device=A.device)
        if case.align in ("A", "joint"):
            M += A.to(dtype) @ ref_A[index % layers].to(dtype).T
        if case.align in ("B", "joint"):
            M += B.to(dtype).T @ ref_B[index % layers].to(dtype)
        found.append(M)
    return torch.stack(found)


def scaling(bench: Bench, sweeps: Sweeps, track: Track) -> dict[str, list[Row]]:
    """The operator along one size at a time, a row a value; along the rank and the number of
    clients also a batched form in plain PyTorch and the mean."""
    found = {}
    for sweep, points in track(sweeps.items(), "scaling"):
        rivals = ("per_layer", "mean") if sweep in ("clients", "rank") else ()
        forms = bench.limits.forms(bench.threads)
        for value, case in points:
            size = bench.cold // len(points)
            inputs = copies(factors(case, bench.device), case.bytes, size)
            known = operator_forms(case, compile=False)
            for name in ("fedrot", *rivals):
                verify = verifier(case, inputs[0], name)
                forms.append(Form(f"{name} {value}", known[name], inputs, bench.threads, verify))
        timings = bench.measure(forms, 2 * bench.seconds)
        rates = bench.limits.rates(timings, bench.threads)
        found[sweep] = [
            {"value": value, **_row(case, _of_point(timings, value), rates)}
            for value, case in points
        ]
    return found


def _of_point(timings: dict[str, Timing], value: str) -> dict[str, Timing]:
    ending = f" {value}"
    return {n.removesuffix(ending): t for n, t in timings.items() if n.endswith(ending)}


def threads(bench: Bench, chosen: Sequence[Case], track: Track) -> list[Row]:
    """The operator on 1, 2, 4, ... threads up to all, each with the limits of as many."""
    counts = [2**i for i in range(bench.threads.bit_length()) if 2**i < bench.threads]
    counts.append(bench.threads)
    rows = []
    for case in track(chosen, "threads"):
        inputs = copies(factors(case, bench.device), case.bytes, bench.cold)
        call = functools.partial(fedrot_kernels.align_aggregate, **case.options)
        forms = [form for n in counts for form in bench.limits.forms(n)]
        forms += [Form(f"fedrot {n}", call, inputs, n) for n in counts]
        timings = bench.measure(forms)
        for n in counts:
            rates = bench.limits.rates(timings, n)
            rows.append({"threads": n, **_row(case, {"fedrot": timings[f"fedrot {n}"]}, rates)})
    return rows


def polar(bench: Bench, track: Track) -> list[Row]:
    """``polar`` against batched ``torch.linalg.svd`` on 32 matrices of each rank."""
    rows = []
    for rank in track(POLAR_RANKS, "polar"):
        case = Case("polar", 32, rank, ((1024, 1024),))
        M = [(cross_covariance(case, factors(case, bench.device, seed)),) for seed in range(2)]
        call = functools.partial(fedrot_kernels.polar, proper=True)
        forms = [
            Form("polar", call, M, bench.threads),
            Form("svd", torch.linalg.svd, M, bench.threads),
        ]
        timings = bench.measure(forms, bench.seconds / 4)
        rows.append({"rank": rank, "matrices": 32, **{n: t.median for n, t in timings.items()}})
    return rows


def truncation(bench: Bench, track: Track) -> list[Row]:
    """FlexLoRA's exact truncation of one layer: dense SVD and QR form in PyTorch, Gram blocks."""
    rows = []
    for case in track(TRUNCATIONS, "truncation"):
        inputs, verify, known = truncation_forms(case, bench.device)
        forms = [Form(n, form, [inputs], bench.threads, verify) for n, form in known.items()]
        timings = bench.measure(forms)
        ((d, k),) = case.shapes
        sizes = {"clients": case.clients, "rank": case.rank, "d": d, "k": k}
        rows.append({**sizes, **{name: t.median for name, t in timings.items()}})
    return rows


def truncation_forms(
    case: Case, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Any], None], dict[str, Callable[..., Any]]]:
    """Inputs of one layer, a check of a result against float64, and the forms by name."""
    lora_A, lora_B, _, _ = factors(case, device)
    weights = torch.full((case.clients,), 1 / case.clients, device=device)
    inputs = (torch.stack(lora_A), torch.stack(lora_B), weights)
    A, B = baselines.truncate_dense(*(t.cpu().double() for t in inputs))
    expected = B @ A

    def verify(result: tuple[Tensor, Tensor]) -> None:
        A, B = result
        check_close(f"the truncation in {case.name}", (B @ A).cpu(), expected, case.dtype)

    return (
        inputs,
        verify,
        {"dense": baselines.truncate_dense, "qr": baselines.truncate_qr, "gram": truncate_gram},
    )


def truncate_gram(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the operators ``gram`` and ``combine``, in the gauge of the first client."""
    clients = list(A), list(B)
    (best_A,), (best_B,) = rspace.combined(*clients, [A[0]], [B[0]], weights, rspace.truncation)
    return best_A, best_B
