"""The least time a call can take: what the machine reads and multiplies, measured in each run."""

from __future__ import annotations

import torch

from fedrot.bench.timing import Form, Timing

CHUNK = 256 * 2**20  # bytes of one read
PRODUCT = {"cpu": 2048, "cuda": 8192}  # size of the square product, large enough for full rate


class Limits:
    """Read bandwidth and multiplication rate, as forms timed among those they are compared with.

    The bandwidth is that of ``torch.sum`` over cold float32 memory, which a hand-written loop
    does not beat; the rate is that of a square float32 product.
    """

    def __init__(self, device: str, total: int) -> None:
        count = max(2, total // CHUNK)
        buffer = torch.ones(count * CHUNK // 4, device=device)
        self.reads = [(chunk,) for chunk in buffer.chunk(count)]
        n = PRODUCT[device]
        self.factors = [(torch.rand(n, n, device=device), torch.rand(n, n, device=device))]
        self.flops = 2 * n**3

    def forms(self, threads: int) -> list[Form]:
        return [
            Form(f"read@{threads}", torch.sum, self.reads, threads),
            Form(f"sgemm@{threads}", torch.mm, self.factors, threads),
        ]

    def rates(self, timings: dict[str, Timing], threads: int) -> dict[str, float]:
        """``{"bandwidth": bytes/s, "sgemm": flop/s}`` out of what the forms took."""
        return {
            "bandwidth": CHUNK / timings[f"read@{threads}"].median,
            "sgemm": self.flops / timings[f"sgemm@{threads}"].median,
        }


def floor(size: int, flops: int, rates: dict[str, float]) -> float:
    """Seconds: ``max(bytes / bandwidth, flops / sgemm rate)``."""
    return max(size / rates["bandwidth"], flops / rates["sgemm"])
