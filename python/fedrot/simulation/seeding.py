"""Random numbers: every draw has a generator of its own, found from what it is for."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator(
    seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one draw, as of ``(seed, "batches", round, client)``.

    Nothing depends on the order or the number of other draws, so a resumed run, or one with
    other clients, sees the same numbers.
    """
    # With their number: SeedSequence does not tell trailing zeros from nothing.
    words = [seed, zlib.crc32(purpose.encode()), len(indices), *indices]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)
