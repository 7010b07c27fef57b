"""The native CUDA kernels (``csrc/cuda``)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fedrot_kernels.backends.gpu import Layout
from fedrot_kernels.checks import DTYPES, accumulate_dtype, check_polar
from fedrot_kernels.ops import implement
from fedrot_kernels.plan import Flat
from fedrot_kernels.plan import implement as implement_plan
from fedrot_kernels.tables import Factors, empty_outputs


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Call(ctypes.Structure):
    """``Call`` of ``csrc/cuda/call.h``."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "layers_at clients_at covariance_units_at apply_units_at"),
        *_fields(ctypes.c_void_p, "partials counters workspaces taken weights"),
        *_fields(ctypes.c_int64, "clients layers slots largest_rank"),
        ("lam", ctypes.c_double),
        *_fields(ctypes.c_int32, "client_dtype ref_dtype proper weighted"),
    )


class _Polar(ctypes.Structure):
    """``Polar`` of ``csrc/cuda/call.h``."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "M out workspaces taken"),
        *_fields(ctypes.c_int64, "count rows n slots"),
        *_fields(ctypes.c_int32, "is_double proper"),
    )


@functools.cache
def _library() -> Any:
    """The shared library; no Python module, although it is found like one.

    Raises:
        ImportError: it was not built.
    """
    spec = importlib.util.find_spec("fedrot_kernels._cuda")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the CUDA kernels are not installed; build them where nvcc is found: "
            "pip install . -C cmake.define.FEDROT_CUDA=ON"
        )
    return declare(ctypes.CDLL(spec.origin))


def declare(library: Any) -> Any:
    """Tell ctypes the functions of ``csrc/cuda/library.h``; returns ``library``."""
    library.fedrot_cuda_run.argtypes = 2 * [ctypes.c_void_p] + [ctypes.c_int64, ctypes.c_void_p]
    library.fedrot_cuda_polar.argtypes = 2 * [ctypes.c_void_p]
    library.fedrot_cuda_workspace_elements.argtypes = [ctypes.c_int64]
    library.fedrot_cuda_workspace_elements.restype = ctypes.c_int64
    for function in (library.fedrot_cuda_run, library.fedrot_cuda_polar):
        function.restype = ctypes.c_char_p
    return library


class _Workspaces:
    """Memory for the r x r problems that do not fit into registers, borrowed by who runs."""

    # Enough for all that run at a time on a large card where they are small; a few hundred MB at
    # most where they are large. Who finds none free waits for another to finish.
    most, least, bytes = 1024, 64, 64 << 20

    def __init__(self, rank: int, matrices: int, dtype: torch.dtype, device: torch.device) -> None:
        elements = _library().fedrot_cuda_workspace_elements(rank)
        fit = self.bytes // (elements * dtype.itemsize)
        self.slots = max(1, min(matrices, self.most, max(self.least, fit)))
        self.memory = torch.empty(self.slots * elements, dtype=dtype, device=device)
        self.taken = torch.zeros(self.slots, dtype=torch.int32, device=device)


def _launch(function: Any, device: torch.device, *arguments: Any) -> None:
    """Call ``function`` on the current stream of ``device``."""
    if device.type != "cuda":  # tests run the kernels on the CPU
        error = function(*arguments, None)
    else:
        with torch.cuda.device(device):
            error = function(*arguments, torch.cuda.current_stream(device).cuda_stream)
    if error:
        raise RuntimeError(f"CUDA: {error.decode()}")


class _Prepared:
    """A call laid out on the device."""

    def __init__(self, layout: Layout, lam: float, proper: bool, weighted: bool) -> None:
        self._layout = layout
        self._workspaces = _Workspaces(
            layout.largest_rank, layout.clients * layout.layers, layout.dtype, layout.device
        )
        sections, weights = layout.sections, layout.weights
        self._call = _Call(
            layout.table.data_ptr(),
            sections.layers,
            sections.clients,
            sections.covariance_units,
            sections.apply_units,
            layout.partials.data_ptr(),
            layout.counters.data_ptr(),
            self._workspaces.memory.data_ptr(),
            self._workspaces.taken.data_ptr(),
            None if weights is None else weights.data_ptr(),
            layout.clients,
            layout.layers,
            self._workspaces.slots,
            layout.largest_rank,
            lam,
            DTYPES.index(layout.client_dtype),
            DTYPES.index(layout.out_dtype),
            proper,
            weighted,
        )
        launches = [bound for launch in layout.launches for bound in launch]
        self._launches = (ctypes.c_int64 * len(launches))(*launches)
        self._arguments = (
            ctypes.addressof(self._call),
            ctypes.addressof(self._launches),
            len(layout.launches),
        )

    def run(self) -> None:
        self._layout.refresh()
        _launch(_library().fedrot_cuda_run, self._layout.device, *self._arguments)

    def rebind(self) -> None:
        self._layout.rebind()


class Runner(_Prepared):
    """``align_aggregate`` with everything checked but the values."""

    def __init__(
        self,
        factors: Factors,
        weights: Tensor | None,
        A: list[Tensor],
        B: list[Tensor],
        lam: float,
        align: str,
        proper: bool,
        flat: Flat | None = None,
    ) -> None:
        layout = Layout(factors, weights, lam, align, out=(A, B), flat=flat)
        super().__init__(layout, lam, proper, weighted=True)


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    A, B = empty_outputs(ref_A, ref_B)
    Runner((lora_A, lora_B, ref_A, ref_B), weights, A, B, lam, align, proper).run()
    return A, B


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    layout = Layout((lora_A, lora_B, ref_A, ref_B), None, lam, align)
    _Prepared(layout, lam, proper, weighted=False).run()
    return layout.aligned


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    check_polar(M)
    dtype = accumulate_dtype(M.dtype)
    m, n = M.shape[-2:]
    matrices = M.to(dtype).contiguous()
    out = torch.empty(M.shape, dtype=dtype, device=M.device)
    count = matrices.numel() // (m * n)
    workspaces = _Workspaces(n, count, dtype, M.device)
    batch = _Polar(
        matrices.data_ptr(),
        out.data_ptr(),
        workspaces.memory.data_ptr(),
        workspaces.taken.data_ptr(),
        count,
        m,
        n,
        workspaces.slots,
        dtype == torch.float64,
        proper,
    )
    _launch(_library().fedrot_cuda_polar, M.device, ctypes.addressof(batch))
    return out


def register() -> None:
    """Make this the implementation on CUDA tensors of every operator but ``gram`` and ``combine``.

    Raises:
        ImportError: the kernels were not built.
    """
    _library()
    for function in (align_aggregate, align, polar):
        implement(function.__name__, "CUDA", function)
    implement_plan("cuda", Runner)
