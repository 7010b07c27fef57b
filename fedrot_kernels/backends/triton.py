"""The kernels in Triton, for any GPU that it supports; on CPU tensors in its interpreter."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedrot_kernels.backends import matmul, reference
from fedrot_kernels.backends.gpu import Layout
from fedrot_kernels.backends.triton_factors import apply_kernel, covariance_kernel
from fedrot_kernels.backends.triton_gram import gram_kernel, gram_sum_kernel
from fedrot_kernels.backends.triton_rotation import polar_kernel, rotation_kernel
from fedrot_kernels.checks import accumulate_dtype, check_mix, check_polar
from fedrot_kernels.ops import implement
from fedrot_kernels.plan import Flat, ThroughOperator
from fedrot_kernels.plan import Runner as AnyRunner
from fedrot_kernels.plan import implement as implement_plan
from fedrot_kernels.tables import Factors, empty_outputs

LARGEST_RANK = 256
"""Above it a matrix is no longer one tile: such calls run the reference."""

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _tile(n: int) -> int:
    return max(2, triton.next_power_of_2(n))


def _warps(tile: int, dtype: torch.dtype) -> int:
    """So many that a matrix takes 32 registers of a thread, as far as a program can have them."""
    most = 16 if torch.version.hip else 32  # 1024 threads
    return max(1, min(most, tile * tile * dtype.itemsize // 4096))


def _launch(warps: int) -> dict[str, Any]:
    """Options of a launch. Fused multiply-adds are asked for: Triton 3.10 no longer takes them by
    itself, and 3.9 warns of it."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def _most_rows(widened: bool) -> int:
    """Of a product. From 64 on Triton (3.7) multiplies what was 16-bit and has been widened as TF32
    on sm_100, whatever precision is asked for."""
    return 32 if widened else 64


def covariance_options(tile: int, dtype: torch.dtype, widened: bool) -> dict[str, Any]:
    """How covariance_kernel is cut for a rank tile and what factors are multiplied in."""
    stack = max(16, min(tile, _most_rows(widened)))
    block = max(16, 4096 // (max(tile, 32) * dtype.itemsize // 2))
    return {"STACK": stack, "BLOCK": min(block, 128), **_launch(8 if tile >= 128 else 4)}


def apply_options(tile: int, dtype: torch.dtype) -> dict[str, Any]:
    """How apply_kernel is cut for a rank tile and the accumulator's dtype."""
    stack = max(16, min(tile, 32 if dtype == torch.float32 else 16))
    block = max(32, min(128, 4096 // tile))
    return {"STACK": stack, "BLOCK": block, **_launch(8 if tile >= 128 else 4)}


def gram_options(size: int, dtype: torch.dtype, widened: bool) -> dict[str, Any]:
    """How gram_kernel is cut for the size of a Gram matrix and what factors are multiplied in."""
    tile = max(16, min(_tile(size), 32 if dtype == torch.float64 else _most_rows(widened)))
    return {"TILE": tile, "BLOCK": max(16, 128 // dtype.itemsize), **_launch(4)}


def _gram_parts(layers: int, stacks: int, positions: int) -> int:
    """Parts of the positions, more than one where there are fewer stacks of directions than keep
    a card busy; a part is read in less time than its partial products are written."""
    programs = layers * stacks * (stacks + 1) // 2
    return max(1, min(1024 // programs, positions // 512))


def _on(device: torch.device) -> Any:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _run_length(values: np.ndarray) -> int:
    """The largest power of two, up to 8, that divides all values."""
    bits = int(np.bitwise_or.reduce(values, axis=None)) | 8
    return bits & -bits


def _rows(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the layers and of the clients in the table."""
    host, s = layout.host.numpy(), layout.sections
    layers = host[s.layers : s.clients].reshape(-1, 13)
    return layers, host[s.clients : s.covariance_units].reshape(-1, 6)


def _vectors(layout: Layout, flat: Flat | None, mix: tuple[Tensor, ...] = ()) -> dict[str, int]:
    """How many elements of a row of A, of B can be read at a time, everywhere."""
    layers, clients = _rows(layout)
    width, out_width = layout.client_dtype.itemsize, layout.out_dtype.itemsize
    bases = np.array([] if flat is None else [b.data_ptr() for b in flat.buffers], np.int64)
    matrices = np.array([t.data_ptr() // t.dtype.itemsize for t in mix], np.int64)
    lengths_A, lengths_B = [layers[:, 1]], [layers[:, 2], clients[:, 4], matrices]
    vectors = {}
    for name, lengths, own, ref, out in (("A", lengths_A, 0, 3, 7), ("B", lengths_B, 2, 5, 9)):
        elements = [
            *lengths,
            bases // width,
            clients[:, own] // width,
            clients[:, own + 1],
            layers[:, ref] // out_width,
            layers[:, out] // out_width,
            layers[:, ref + 1],
            layers[:, out + 1],
        ]
        vectors[f"VECTOR_{name}"] = _run_length(np.concatenate(elements))
    return vectors


def _table(layout: Layout) -> dict[str, Any]:
    """What every kernel is told of a call."""
    s = layout.sections
    return {
        "table": layout.table,
        "layers_at": s.layers,
        "clients_at": s.clients,
        "layers": layout.layers,
        "clients": layout.clients,
    }


def _multiplied_in(layout: Layout) -> tuple[torch.dtype, bool]:
    """What factors are multiplied with each other in, and whether they are widened for it: both
    are where their dtypes differ."""
    widened = layout.client_dtype != layout.out_dtype
    return layout.dtype if widened else layout.client_dtype, widened


def _averages(layout: Layout, mix: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Arguments of apply_kernel, to average with the matrices of ``mix`` or with rotations."""
    tile = _tile(layout.largest_rank)
    # Any pointer will do where none are read.
    mix_A, mix_B = mix or (layout.partials, layout.partials)
    return {
        **_table(layout),
        "units_at": layout.sections.apply_units,
        "mix_A": mix_A,
        "mix_B": mix_B,
        "rank": layout.largest_rank,
        "MIX": mix is not None,
        "ACCUMULATE": _TYPES[layout.dtype],
        "CLIENT": _TYPES[layout.client_dtype],
        "OUT": _TYPES[layout.out_dtype],
        "P": tile,
        **apply_options(tile, layout.dtype),
    }


_MOST_BLOCKS = 65535  # of a launch, on any axis but the first


class Launches:
    """Every launch of one call over a :class:`Layout`."""

    def __init__(
        self, layout: Layout, lam: float, proper: bool, average: bool, flat: Flat | None
    ) -> None:
        self._layout = layout
        s = layout.sections
        unit_layers = layout.host.numpy()[s.covariance_units : s.apply_units : 5]
        self._groups = [
            (int(unit_layers[begin]), int(unit_layers[end - 1]) + 1, begin, end)
            for begin, end, _, _ in layout.launches
            if end > begin
        ]
        # A launch of the layout holds the outputs of the group before.
        self._outputs = [(begin, end) for _, _, begin, end in layout.launches[1:]]

        self._tile = tile = _tile(layout.largest_rank)
        self._covariance = {
            **_table(layout),
            "units_at": s.covariance_units,
            "partials": layout.partials,
            "CLIENT": _TYPES[layout.client_dtype],
            "REFERENCE": _TYPES[layout.out_dtype],
            "P": tile,
            **covariance_options(tile, *_multiplied_in(layout)),
        }
        self._stacks = triton.cdiv(layout.clients * tile, self._covariance["STACK"])
        if max(self._stacks, layout.clients) > _MOST_BLOCKS:
            raise ValueError(
                f"lora_A: Triton's kernels take fewer clients of rank {layout.largest_rank} in a "
                f"call than {layout.clients}; use the CUDA backend or several calls"
            )
        uniform_or_given = "uniform" if layout.weights is None else "given"
        self._rotation = {
            **_table(layout),
            "units_at": s.covariance_units,
            "partials": layout.partials,
            # Any pointer will do where no weights are read.
            "weights": layout.partials if layout.weights is None else layout.weights,
            "flags": layout.counters,
            "lam_bits": struct.unpack("q", struct.pack("d", lam or 1.0))[0],
            "WEIGHTS": uniform_or_given if average else "none",
            "STAGES": 0 if lam == 0 else 1 if lam == 1 else 2,
            "PROPER": proper,
            "P": tile,
            **_launch(_warps(tile, layout.dtype)),
        }
        self._apply = _averages(layout)
        self._vectors = _vectors(layout, flat)

    def rebind(self) -> None:
        """The launches stay what they are, also those that a graph has captured."""
        self._layout.rebind(max(self._vectors.values()) * self._layout.client_dtype.itemsize)

    def __call__(self) -> None:
        layout, clients = self._layout, self._layout.clients
        with _on(layout.device):
            layout.refresh()
            for group, (first_layer, end_layer, begin, end) in enumerate(self._groups):
                covariance_kernel[(end - begin, self._stacks)](
                    first_unit=begin, **self._covariance, **self._vectors
                )
                for any_rank in (False, True):
                    rotation_kernel[(end_layer - first_layer, clients)](
                        first_layer=first_layer, ANY=any_rank, **self._rotation
                    )
                if self._outputs:
                    begin, end = self._outputs[group]
                    apply_kernel[(end - begin,)](first_unit=begin, **self._apply, **self._vectors)


class Runner:
    """A call of ``align_aggregate`` whose launches read the values of the moment."""

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
        self._launches = Launches(layout, lam, proper, True, flat)

    def run(self) -> None:
        self._launches()

    def rebind(self) -> None:
        self._launches.rebind()


def plan(factors, weights, A, B, lam, align, proper, flat=None) -> AnyRunner:
    runner = ThroughOperator if _too_large(factors[2]) else Runner
    return runner(factors, weights, A, B, lam, align, proper, flat)


def _too_large(ref_A: list[Tensor]) -> bool:
    return max((t.shape[0] for t in ref_A if t.dim() == 2), default=0) > LARGEST_RANK


def align_aggregate(
    lora_A, lora_B, ref_A, ref_B, weights=None, *, lam=0.4, align="joint", proper=True
) -> tuple[list[Tensor], list[Tensor]]:
    factors = (lora_A, lora_B, ref_A, ref_B)
    if _too_large(ref_A):
        options = {"lam": lam, "align": align, "proper": proper}
        return reference.align_aggregate(*factors, weights, **options)
    A, B = empty_outputs(ref_A, ref_B)
    Runner(factors, weights, A, B, lam, align, proper).run()
    return A, B


def align(lora_A, lora_B, ref_A, ref_B, *, lam=0.4, align="joint", proper=True) -> list[Tensor]:
    factors = (lora_A, lora_B, ref_A, ref_B)
    if _too_large(ref_A):
        return reference.align(*factors, lam=lam, align=align, proper=proper)
    layout = Layout(factors, None, lam, align)
    Launches(layout, lam, proper, False, None)()
    return layout.aligned


def polar(M: Tensor, *, proper: bool = False) -> Tensor:
    check_polar(M)
    m, n = M.shape[-2:]
    if n > LARGEST_RANK:
        return reference.polar(M, proper=proper)
    matrices = M.to(accumulate_dtype(M.dtype)).contiguous()
    out = torch.empty(M.shape, dtype=matrices.dtype, device=M.device)
    count = matrices.numel() // (m * n)
    flags = torch.zeros(count, dtype=torch.int32, device=M.device)
    options = {"PROPER": proper, "P": _tile(n), **_launch(_warps(_tile(n), out.dtype))}
    with _on(M.device):
        for any_rank in (False, True) if count else ():
            polar_kernel[(count,)](matrices, out, flags, m, n, ANY=any_rank, **options)
    return out


def gram(lora_A, lora_B, ref_A, ref_B) -> tuple[Tensor, Tensor]:
    layout = Layout((lora_A, lora_B, ref_A, ref_B), None, 0.0, "joint", rotations=False)
    vectors = _vectors(layout, None)
    return (
        _gram(layout, on_A=True, vector=vectors["VECTOR_A"]),
        _gram(layout, on_A=False, vector=vectors["VECTOR_B"]),
    )


def _gram(layout: Layout, on_A: bool, vector: int) -> Tensor:
    """The Gram matrix of A or of B of every layer."""
    layers, size = layout.layers, (layout.clients + 1) * layout.largest_rank
    options = gram_options(size, *_multiplied_in(layout))
    stacks = triton.cdiv(size, options["TILE"])
    longest = int(_rows(layout)[0][:, 1 if on_A else 0].max())
    parts = _gram_parts(layers, stacks, longest)
    gram = torch.empty(layers, size, size, dtype=layout.dtype, device=layout.device)
    partials = gram if parts == 1 else gram.new_empty(layers, parts, size, size)
    with _on(layout.device):
        gram_kernel[(stacks * stacks, layers, parts)](
            **_table(layout),
            gram=gram,
            partials=partials,
            rank=layout.largest_rank,
            ON_A=on_A,
            CLIENT=_TYPES[layout.client_dtype],
            REFERENCE=_TYPES[layout.out_dtype],
            VECTOR=vector,
            **options,
        )
        if parts > 1:
            del options["BLOCK"]
            gram_sum_kernel[(stacks * stacks, layers)](
                partials=partials, gram=gram, size=size, parts=parts, **options
            )
    return gram


def combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B) -> tuple[list[Tensor], list[Tensor]]:
    factors = (lora_A, lora_B, ref_A, ref_B)
    if _too_large(ref_A):
        return matmul.combine(*factors, mix_A, mix_B)
    A, B = empty_outputs(ref_A, ref_B)
    layout = Layout(factors, None, 0.0, "joint", out=(A, B), rotations=False)
    rank = layout.largest_rank
    shape = (layout.layers, layout.clients, rank, rank)
    check_mix(shape, layout.dtype, layout.device, mix_A, mix_B)
    mix = mix_A.contiguous(), mix_B.contiguous()
    units = sum(end - begin for _, _, begin, end in layout.launches)
    with _on(layout.device):
        apply_kernel[(units,)](
            first_unit=0, **_averages(layout, mix), **_vectors(layout, None, mix)
        )
    return A, B


def register_blocks(dispatch_key: str) -> None:
    """``gram`` and ``combine`` alone, for a backend that has neither."""
    for function in (gram, combine):
        implement(function.__name__, dispatch_key, function)


def register(dispatch_key: str = "CUDA") -> None:
    """Make this the implementation of every operator for one dispatch key."""
    for function in (align_aggregate, align, polar):
        implement(function.__name__, dispatch_key, function)
    register_blocks(dispatch_key)
    implement_plan(dispatch_key.lower(), plan)
