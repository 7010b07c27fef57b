"""The threads and inputs of every benchmark here."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedrot.bench import machine

torch.set_num_threads(machine.cores())


@pytest.fixture
def time_in_turns(benchmark):
    """``run(function, inputs)``: time ``function`` on each of ``inputs`` in turn, so that no call
    finds its data in cache because the call before left it there."""

    def run(function, inputs, rounds: int = 7):
        turn = itertools.cycle(inputs)
        return benchmark.pedantic(
            function, setup=lambda: (next(turn), {}), rounds=rounds, warmup_rounds=1, iterations=1
        )

    return run
