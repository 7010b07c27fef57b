"""What the streaming aggregator costs a client, in time, memory and digits:

    python -m benchmarks.streaming      # docs/scaling/streaming.json and .png, ten minutes

Times are those that the processor spends on this process, on one thread: what else runs on the
machine does not count, but for the memory bandwidth that it takes away.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fedrot.bench import machine
from fedrot.bench.cases import LLAMA_8B_QV, Case, factors
from fedrot.cli._progress import progress
from fedrot.factors import Factors
from fedrot.files import new_file, write_json
from fedrot.report.plots import COLORS, PLAIN, png_bytes, themed_figure
from fedrot.streaming import StreamingAggregator, _Mean
from fedrot.tasks.base import Track, no_progress
from fedrot_kernels import align_aggregate
from fedrot_kernels.backends import reference

OUTPUT = Path(__file__).parents[1] / "docs" / "scaling"
LLAMA_1B_QV = ((2048, 2048), (512, 2048)) * 16
SIMULATED = Case("llama-3.2-1b-qv-r8", 1, 8, LLAMA_1B_QV, align="joint")
COSTS = tuple(
    Case(f"llama-3-8b-qv-r{r}", 1, r, LLAMA_8B_QV, dtype, "joint")
    for dtype in (torch.float32, torch.bfloat16)
    for r in (8, 16)
)
POOL = 32  # different clients; every one that arrives is a fresh copy of one of them


def simulate(case: Case, clients: int, bins: int = 100, track: Track = no_progress) -> dict:
    """Stream ``clients`` through an aggregator.

    Returns:
        for each of ``bins`` equal parts of the stream the processor time a client in ms (median,
        5th and 95th percentile) and the resident memory at its end in MB; ``error``: the largest
        deviation of the result from the float64 reference, relative to its largest entry.
    """
    ref, pool = adapters(case, POOL)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(1, 200, (clients,), generator=generator).tolist()
    total = [0] * POOL
    aggregator = StreamingAggregator(ref, lam=case.lam, align=case.align)
    size = clients // bins
    rows, times = [], []
    for i in track(range(size * bins), "clients"):
        client = copy(pool[i % POOL])
        total[i % POOL] += weights[i]
        begin = time.process_time()
        aggregator.accept(client, weights[i])
        times.append(1000 * (time.process_time() - begin))
        del client
        if len(times) == size:
            q = statistics.quantiles(times, n=20, method="inclusive")
            spread = {"median": statistics.median(times), "q05": q[0], "q95": q[-1]}
            rows.append({"clients": i + 1, **spread, "resident": _resident()})
            times.clear()
    return {
        "case": case.name,
        "bytes": case.bytes,
        "bins": rows,
        "error": _error(aggregator.finish(), pool, ref, total, case),
    }


def adapters(case: Case, clients: int) -> tuple[Factors, list[Factors]]:
    """The reference in float32, and clients in the dtype of the case."""
    lora_A, lora_B, ref_A, ref_B = factors(replace(case, clients=clients))
    names = [f"layer{i}" for i in range(len(ref_A))]

    def named(A: Sequence[Tensor], B: Sequence[Tensor]) -> Factors:
        return Factors(dict(zip(names, A, strict=True)), dict(zip(names, B, strict=True)))

    n = len(names)
    pool = [named(lora_A[i : i + n], lora_B[i : i + n]) for i in range(0, n * clients, n)]
    return named([t.float() for t in ref_A], [t.float() for t in ref_B]), pool


def copy(client: Factors) -> Factors:
    """In memory of its own, as a message that has just come in."""
    return Factors(
        {name: A.clone() for name, A in client.A.items()},
        {name: B.clone() for name, B in client.B.items()},
    )


def sums(largest: int, track: Track = no_progress) -> list[dict[str, float]]:
    """The error of three ways to sum weighted clients, each 64 values of mean and deviation 1,
    after 10^2, 10^3, ... of them: relative to the largest entry of the float64 mean."""
    generator = torch.Generator().manual_seed(0)
    blocks, single = _Mean([torch.zeros(64)]), torch.zeros(64)
    exact, weight = torch.zeros(64, dtype=torch.float64), 0
    rows = []
    for i in track(range(1, largest + 1), "sums"):
        x = torch.randn(64, generator=generator).add_(1.0)
        w = i * 7919 % 199 + 1
        blocks.add([x], w)
        single.add_(x, alpha=w)
        exact.add_(x.double(), alpha=w)
        weight += w
        if i >= 100 and i == 10 ** (len(str(i)) - 1):
            mean = exact / weight

            def off(t: Tensor, mean: Tensor = mean) -> float:
                return float((t.double() - mean).abs().max() / mean.abs().max())

            row = {"float32": off(single.double() / weight), "blocks": off(blocks.settled()[0])}
            rows.append({"clients": i, **row})
    return rows


def costs(case: Case, rounds: int = 25) -> dict[str, Any]:
    """Processor time in ns per element of a client, medians in turns: the operator on one client,
    ``accept``, the same with sums of one kind alone, ``accept`` without alignment (for clients
    that have aligned themselves), ``merge`` of a state; and of one client among ten in a call."""
    ref, pool = adapters(case, 10)
    options = {"lam": case.lam, "align": case.align}
    ref_A, ref_B = list(ref.A.values()), list(ref.B.values())
    like = [*ref_A, *ref_B]
    aligning, plain = StreamingAggregator(ref, **options), StreamingAggregator(ref, lam=0.0)
    single = [torch.zeros_like(t) for t in like]
    double = [torch.zeros_like(t, dtype=torch.float64) for t in like]
    state = aligning.state_dict() | {"weight": torch.tensor(1.0), "clients": torch.tensor(1)}
    uploads = [t for c in pool for t in c.A.values()], [t for c in pool for t in c.B.values()]

    def operator(client: Factors) -> list[Tensor]:
        A, B = align_aggregate([*client.A.values()], [*client.B.values()], ref_A, ref_B, **options)
        return [*A, *B]

    forms: dict[str, Callable[[Factors], Any]] = {
        "operator": operator,
        "accept": lambda c: aligning.accept(c, 3.0),
        "float32 sums": lambda c: torch._foreach_add_(single, operator(c), alpha=3.0),
        "float64 sums": lambda c: torch._foreach_add_(double, operator(c), alpha=3.0),
        "no alignment": lambda c: plain.accept(c, 3.0),
        "merge": lambda c: aligning.merge(state),
        "ten at once": lambda c: align_aggregate(*uploads, ref_A, ref_B, **options),
    }
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            client = pool[i % len(pool)]
            begin = time.process_time()
            form(client)
            if i:  # the first is for memory to be there
                samples[name].append(time.process_time() - begin)
    shared = {"ten at once": 10}
    return {
        "case": case.name,
        "dtype": case.dtype_name,
        "rank": case.rank,
        "elements": case.elements,
        "ns": {
            name: 1e9 * statistics.median(values) / case.elements / shared.get(name, 1)
            for name, values in samples.items()
        },
    }


def _error(
    result: Factors, pool: list[Factors], ref: Factors, total: list[int], case: Case
) -> float:
    """Against the float64 reference on the first two layers."""
    layers = list(ref.A)[:2]
    A, B = reference.align_aggregate(
        [c.A[n].double() for c in pool for n in layers],
        [c.B[n].double() for c in pool for n in layers],
        [ref.A[n].double() for n in layers],
        [ref.B[n].double() for n in layers],
        torch.tensor(total),
        lam=case.lam,
        align=case.align,
    )
    pairs = zip([*A, *B], [side[n] for side in (result.A, result.B) for n in layers], strict=True)
    return max(float((e - t.double()).abs().max() / e.abs().max()) for e, t in pairs)


def _resident() -> float:
    return psutil.Process().memory_info().rss / 1e6


def draw(result: dict[str, Any]) -> bytes:
    """PNG: time and memory over the stream, and the error of sums."""
    bins, size = result["simulation"]["bins"], result["simulation"]["bytes"] / 1e6
    clients = [row["clients"] for row in bins]
    with themed_figure("light", 3, 13.0, 3.8) as (figure, (left, middle, right)):
        left.fill_between(
            clients,
            [row["q05"] for row in bins],
            [row["q95"] for row in bins],
            color=COLORS[0],
            alpha=0.2,
            linewidth=0,
            label="5th to 95th percentile",
        )
        left.plot(clients, [row["median"] for row in bins], color=COLORS[0], label="median")
        left.set_ylim(0, 1.5 * max(row["q95"] for row in bins))
        left.set_ylabel("processor time a client, ms")
        middle.plot(
            clients, [n * size for n in clients], color=PLAIN, label="all clients kept (computed)"
        )
        middle.plot(
            clients, [row["resident"] for row in bins], color=COLORS[0], label="process, measured"
        )
        middle.set_yscale("log")
        middle.set_ylabel("memory, MB")
        for ax in (left, middle):
            ax.set_xlabel("clients accepted")
        counts = [row["clients"] for row in result["sums"]]
        for name, label, color in (
            ("float32", "one float32 sum", PLAIN),
            ("blocks", "float32 blocks into a float64 mean", COLORS[0]),
        ):
            values = [row[name] for row in result["sums"]]
            right.plot(counts, values, color=color, marker="o", markersize=3.5, label=label)
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("clients")
        right.set_ylabel("error of the mean, relative")
        for ax in (left, middle, right):
            ax.legend(frameon=False)
        return png_bytes(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--sums", type=int, default=10**6, help="clients of the sums alone")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with progress() as track:
        result = {
            "machine": machine.describe("cpu", 1),
            "simulation": simulate(SIMULATED, options.clients, track=track),
            "sums": sums(options.sums, track),
            "costs": [costs(case) for case in track(COSTS, "costs")],
        }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "streaming.json", result)
    with new_file(options.output / "streaming.png") as fresh:
        fresh.write_bytes(draw(result))


if __name__ == "__main__":
    main()
