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
from fedrot.factors import Factors
from fedrot.files import write_bytes, write_json
from fedrot.progress import Track, no_progress, progress
from fedrot.report.plots import COLORS, PLAIN, png_bytes, themed_figure
from fedrot.streaming import StreamingAggregator, _Mean
from fedrot_kernels import align_aggregate
from fedrot_kernels.backends import reference
from fedrot_kernels.plan import run_once
from fedrot_kernels.tables import empty_outputs

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
        ``bins``: for each of so many equal parts of the stream the processor time a client in ms
        (median, 5th and 95th percentile), the median of the same client in an aggregator that is
        new in every part (``fresh``), and the resident memory at its end in MB; ``error``: the
        largest deviation of the result from the float64 reference, relative to its largest entry.
    """
    ref, pool = adapters(case, POOL)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(1, 200, (clients,), generator=generator).tolist()
    total = [0] * POOL
    aggregator = StreamingAggregator(ref, lam=case.lam, align=case.align)
    size = clients // bins
    rows = []
    for part in track(range(bins), f"{clients} clients"):
        fresh = StreamingAggregator(ref, lam=case.lam, align=case.align)
        times: dict[StreamingAggregator, list[float]] = {aggregator: [], fresh: []}
        for i in range(part * size, (part + 1) * size):
            total[i % POOL] += weights[i]
            # Each goes first every other time.
            for one in (aggregator, fresh) if i % 2 else (fresh, aggregator):
                client = copy(pool[i % POOL])
                begin = time.process_time()
                one.accept(client, weights[i])
                times[one].append(1000 * (time.process_time() - begin))
        q = statistics.quantiles(times[aggregator], n=20, method="inclusive")
        rows.append(
            {
                "clients": (part + 1) * size,
                "median": statistics.median(times[aggregator]),
                "q05": q[0],
                "q95": q[-1],
                "fresh": statistics.median(times[fresh]),
                "resident": psutil.Process().memory_info().rss / 1e6,
            }
        )
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
    for i in track(range(1, largest + 1), f"sums of {largest}"):
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


def costs(
    cases: Sequence[Case], rounds: int = 25, track: Track = no_progress
) -> list[dict[str, Any]]:
    """Processor time in ns per element of a client, medians; all cases and forms in turns."""
    forms = [_forms(case) for case in cases]
    samples: list[dict[str, list[float]]] = [{name: [] for name in those} for those in forms]
    for i in track(range(rounds + 1), "costs"):
        for those, into in zip(forms, samples, strict=True):
            for name, form in those.items():
                begin = time.process_time()
                form(i)
                if i:  # the first is for memory to be there
                    into[name].append(time.process_time() - begin)
    shared = {"ten at once": 10}
    return [
        {
            "case": case.name,
            "dtype": case.dtype_name,
            "rank": case.rank,
            "elements": case.elements,
            "ns": {
                name: 1e9 * statistics.median(values) / case.elements / shared.get(name, 1)
                for name, values in times.items()
            },
        }
        for case, times in zip(cases, samples, strict=True)
    ]


def _forms(case: Case) -> dict[str, Callable[[int], Any]]:
    """What is timed, on client ``i``:

    ``operator``; ``run_once``: the same into memory that stays; ``float32 sums`` and ``float64
    sums``: that, and added to sums of one kind; ``accept``; ``no alignment``: ``accept`` of a
    client that has aligned itself; ``merge`` of a state; ``ten at once``: the operator on ten.
    """
    ref, pool = adapters(case, 10)
    options: dict[str, Any] = {"lam": case.lam, "align": case.align}
    ref_A, ref_B = list(ref.A.values()), list(ref.B.values())
    A, B = empty_outputs(ref_A, ref_B)
    single = [torch.zeros_like(t) for t in (*A, *B)]
    double = [torch.zeros_like(t, dtype=torch.float64) for t in (*A, *B)]
    aligning, plain = StreamingAggregator(ref, **options), StreamingAggregator(ref, lam=0.0)
    state = aligning.state_dict()
    state["weight"], state["clients"] = torch.ones(2, dtype=torch.float64)
    lora = [([*c.A.values()], [*c.B.values()]) for c in pool]
    ten = [t for A, _ in lora for t in A], [t for _, B in lora for t in B]

    def once(i: int) -> None:
        run_once((*lora[i % 10], ref_A, ref_B), A, B, **options, proper=True)

    def added(i: int, sums: list[Tensor]) -> None:
        once(i)
        torch._foreach_add_(sums, [*A, *B], alpha=3.0)

    return {
        "operator": lambda i: align_aggregate(*lora[i % 10], ref_A, ref_B, **options),
        "run_once": once,
        "float32 sums": lambda i: added(i, single),
        "float64 sums": lambda i: added(i, double),
        "accept": lambda i: aligning.accept(pool[i % 10], 3.0),
        "no alignment": lambda i: plain.accept(pool[i % 10], 3.0),
        "merge": lambda i: aligning.merge(state),
        "ten at once": lambda i: align_aggregate(*ten, ref_A, ref_B, **options),
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
        fresh = [row["fresh"] for row in bins]
        label = "median, new aggregator in every part"
        left.plot(clients, fresh, color=PLAIN, linewidth=4, label=label)
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
            "costs": costs(COSTS, track=track),
        }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "streaming.json", result)
    write_bytes(options.output / "streaming.png", draw(result))


if __name__ == "__main__":
    main()
