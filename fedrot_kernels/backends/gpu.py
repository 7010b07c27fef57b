"""What the CUDA and the Triton backend share: a call laid out in device memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrot_kernels.checks import ALIGN_MODES, accumulate_dtype
from fedrot_kernels.native import load
from fedrot_kernels.plan import Flat
from fedrot_kernels.tables import Factors, empty_rotations, outputs, read

_cpu = load("_cpu")


class Layout:
    """One call of ``align_aggregate`` or ``align`` as device kernels read it (``csrc/device.h``).

    Everything a kernel needs is allocated and copied here; launching over it does neither.

    Attributes:
        table: int64, on the device; ``sections`` holds the offsets of its parts.
        host: the same on the host, as it was made.
        launches: ``(covariance_begin, covariance_end, apply_begin, apply_end)``, ranges of units.
        partials: workspace for the partial cross-covariances, in ``dtype``.
        counters: int32 ``(clients * layers,)``, zero; a kernel that counts leaves them zero.
        rotations: workspace for the weighted rotations, with ``out``.
        aligned: the results of ``align``, ``clients * layers`` of them, without ``out``.
        weights: float64 ``(clients,)`` or ``None``, as given: kernels normalise.
        dtype: what is accumulated in, float32 or float64.
    """

    def __init__(
        self,
        factors: Factors,
        weights: Tensor | None,
        lam: float,
        align: str,
        *,
        out: tuple[list[Tensor], list[Tensor]] | None = None,
        flat: Flat | None = None,
        rotations: bool = True,
    ) -> None:
        """``out`` for ``align_aggregate``; without it for ``align``, which returns ``aligned``.
        With ``flat`` clients can be moved, see :meth:`rebind`. Without ``rotations`` the table
        alone, for kernels that neither find nor apply any."""
        tables, factors = read(factors, weights, lam, align)
        # Keeps alive what the table points to; flat buffers keep themselves.
        self._kept = factors if flat is None else factors[2:], out
        self._flat = flat
        self.clients, self.layers = tables.clients, len(tables.shapes)
        self.client_dtype, self.out_dtype = factors[0][0].dtype, factors[2][0].dtype
        self.dtype = accumulate_dtype(self.client_dtype, self.out_dtype)
        self.device = device = factors[0][0].device
        self.largest_rank = max(r for _, _, r in tables.shapes)

        call = _cpu.DeviceCall(
            tables, ALIGN_MODES.index(align), out is not None, _cache_bytes(device)
        )
        self.sections, self.launches = call.sections, call.launches
        matrices = self.clients * self.layers if rotations else 0
        partials = call.partials if rotations else 0
        self.partials = torch.empty(partials, dtype=self.dtype, device=device)
        self.counters = torch.zeros(matrices, dtype=torch.int32, device=device)
        self.aligned: list[Tensor] = []
        if not rotations:
            addresses = [0] * (self.clients * self.layers)
        elif out is not None:
            self.rotations = torch.empty(call.rotations, dtype=self.dtype, device=device)
            addresses = _cpu.rotations_in(self.rotations.data_ptr(), self.dtype.itemsize, tables)
        else:
            self.aligned = empty_rotations(factors)
            addresses = [R.data_ptr() for R in self.aligned]

        pinned = device.type == "cuda"
        self.host = host = torch.empty(call.sections.size, dtype=torch.int64, pin_memory=pinned)
        A, B = out or ([], [])
        call.pack(tables, self._bases(), addresses, outputs(A, B), host.data_ptr())
        self.table = host.to(device, non_blocking=True)

        # Read where they lie if possible, else refreshed before every launch.
        self.weights = weights
        self._converted: tuple[Tensor, Tensor] | None = None
        if weights is not None and not (weights.dtype == torch.float64 and weights.is_contiguous()):
            self.weights = weights.to(torch.float64, copy=True).contiguous()
            self._converted = (self.weights, weights)

    def refresh(self) -> None:
        """Take over the present values of the weights; before the launches of every call."""
        if self._converted is not None:
            to, given = self._converted
            to.copy_(given)

    def rebind(self, multiple: int = 1) -> None:
        """Point every client at its present flat buffer: one small copy in the current stream.

        Raises:
            ValueError: a buffer does not begin at a multiple of so many bytes; nothing has changed.
        """
        bases = self._bases()
        for client, base in enumerate(bases):
            if base % multiple:
                raise ValueError(
                    f"buffers[{client}] must begin at a multiple of {multiple} bytes, as those "
                    "that the plan was made with do"
                )
        host = torch.tensor(bases, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.table[: self.clients].copy_(host, non_blocking=True)

    def _bases(self) -> list[int]:
        if self._flat is None:
            return [0] * self.clients
        return [buffer.data_ptr() for buffer in self._flat.buffers]


def _cache_bytes(device: torch.device) -> int:
    """How much of the factors a group of layers may hold so that its second read, one launch
    later, finds them in the L2 cache beside the next group's."""
    if device.type != "cuda":
        return 16 << 20
    return int(torch.cuda.get_device_properties(device).L2_cache_size * 2 / 5)
