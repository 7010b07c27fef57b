"""Forms of a computation, timed in turns so that a disturbance of the machine hits all alike."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

BURST = 0.03  # seconds a round that a fast form is called again
MAX_BURST = 8


@dataclass
class Form:
    """One way to compute something; called with each of ``inputs`` in turn.

    ``verify`` gets the result of the first call on ``inputs[0]`` and raises where it is wrong.
    """

    name: str
    function: Callable[..., Any]
    inputs: Sequence[Sequence[Any]]
    threads: int
    verify: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over ``calls``."""

    median: float
    q25: float
    q75: float
    calls: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        q25, _, q75 = statistics.quantiles(samples, n=4, method="inclusive")
        return Timing(statistics.median(samples), q25, q75, len(samples))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(
    forms: Sequence[Form], device: str, seconds: float, rounds: tuple[int, int] = (3, 30)
) -> dict[str, Timing]:
    """Verify every form, then time all of them in turns for about ``seconds`` in all.

    A round calls each form once, and fast forms a few times more; there are between ``rounds``.
    """
    with _quiet_interpreter():
        turns = {form.name: itertools.cycle(form.inputs) for form in forms}
        calls = {}
        once = {}
        for form in forms:
            torch.set_num_threads(form.threads)
            result = form.function(*next(turns[form.name]))
            if form.verify is not None:
                form.verify(result)
            del result
            once[form.name] = time_call(form.function, next(turns[form.name]), device)
            calls[form.name] = min(MAX_BURST, max(1, int(BURST / once[form.name])))
        a_round = sum(once[name] * calls[name] for name in calls)
        samples: dict[str, list[float]] = {form.name: [] for form in forms}
        for _ in range(min(rounds[1], max(rounds[0], int(seconds / a_round)))):
            for form in forms:
                if torch.get_num_threads() != form.threads:
                    torch.set_num_threads(form.threads)
                for _ in range(calls[form.name]):
                    inputs = next(turns[form.name])
                    samples[form.name].append(time_call(form.function, inputs, device))
    return {name: Timing.of(values) for name, values in samples.items()}


def time_call(function: Callable[..., Any], inputs: Sequence[Any], device: str) -> float:
    """Seconds of one call; the result is freed after the clock has stopped."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = function(*inputs)
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    result = function(*inputs)
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """No garbage collection, no gradients; the number of threads is put back afterwards."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
