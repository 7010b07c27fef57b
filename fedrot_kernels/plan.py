"""``Plan``: the same ``align_aggregate`` on the same buffers, round after round."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from fedrot_kernels import checks
from fedrot_kernels.tables import empty_outputs


class Runner(Protocol):
    """A call that a backend has prepared."""

    def run(self) -> None:
        """Fill the outputs from the current values of everything else."""

    def rebind(self) -> None:
        """The clients' factors now lie in other ``flat.buffers``; where that cannot be, raise
        ValueError and change nothing."""


@dataclass
class Flat:
    """The factors of every client in a buffer of its own, all with the same layout."""

    buffers: list[Tensor]  # one a client, 1-D
    offsets: Sequence[tuple[int, int]]  # of A and B of each layer, in elements
    shapes: list[tuple[int, int, int]]  # (d, k, r) of each layer

    @property
    def size(self) -> int:
        """Elements that a buffer must hold."""
        ends = [
            max(a + r * k, b + d * r)
            for (a, b), (d, k, r) in zip(self.offsets, self.shapes, strict=True)
        ]
        return max(ends, default=0)

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """``(lora_A, lora_B)``, views of the buffers."""
        lora_A, lora_B = [], []
        for buffer in self.buffers:
            for (a, b), (d, k, r) in zip(self.offsets, self.shapes, strict=True):
                lora_A.append(buffer[a : a + r * k].view(r, k))
                lora_B.append(buffer[b : b + d * r].view(d, r))
        return lora_A, lora_B


# (factors, weights, A, B, lam, align, proper, flat) -> Runner. The arguments are checked already.
# Where `flat` is given the clients' factors lie in its buffers and are nobody else's to keep.
Planner = Callable[..., Runner]
_planners: dict[str, Planner] = {}

NAMES = ("lora_A", "lora_B", "ref_A", "ref_B")


def implement(device_type: str, planner: Planner) -> None:
    """Register how a backend plans; a device without a planner goes through the operator."""
    _planners[device_type] = planner


class Plan:
    """:func:`fedrot_kernels.align_aggregate` prepared once for tensors whose values change.

    A server that receives every round into the same buffers checks them, allocates the outputs
    and builds the tables of the kernels once; ``plan()`` only computes. It reads the *current*
    values of every tensor given here, ``weights`` included (``weights.copy_(...)`` between
    rounds; a client that sits out a round has weight 0 and finite factors), overwrites the
    outputs and returns them::

        plan = Plan(lora_A, lora_B, ref_A, ref_B, weights, lam=0.4)
        for _ in range(rounds):
            ...  # fill the factors and the weights in place
            A, B = plan()

    Args:
        lora_A, lora_B, ref_A, ref_B, weights, lam, align, proper: as for
            :func:`~fedrot_kernels.align_aggregate`, but plain dense tensors with contiguous rows:
            a copy would not follow their values.
        out: ``(A, B)`` to write into: ``L`` tensors ``(r, k)`` and ``L`` tensors ``(d, r)`` in
            the dtype of the reference, with contiguous rows, that overlap neither an input nor
            each other. ``None``: allocated here.

    Attributes:
        A, B: the outputs, the same tensors for the life of the plan. Values that outlive the next
            call must be copied.

    The plan belongs to the memory that the tensors have now and keeps it alive. Giving one of
    them other memory later (``t.data = ...``, ``t.set_``) does not reach the plan, and enlarging
    one with ``t.resize_`` is an error that nothing detects.

    For the same reason it is neither copied nor pickled: make a plan of the copied tensors.

    Not differentiable; autograd is told that the outputs have changed. ``plan()`` may be called
    from any thread, but one call of a plan at a time, and not while another thread writes its
    inputs.

    Raises:
        ValueError, TypeError: as ``align_aggregate``, or a tensor is not one that can be planned;
            the message names it. ``plan()`` raises ``ValueError`` for bad weights, and (on CPU)
            for a value that is not finite or a result that overflows: the outputs then hold no
            result until a call succeeds.
    """

    def __init__(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        ref_A: Sequence[Tensor],
        ref_B: Sequence[Tensor],
        weights: Tensor | None = None,
        *,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        self._prepare((lora_A, lora_B, ref_A, ref_B), weights, lam, align, proper, out, None)

    @classmethod
    def flat(
        cls,
        buffers: Sequence[Tensor],
        ref_A: Sequence[Tensor],
        ref_B: Sequence[Tensor],
        weights: Tensor | None = None,
        *,
        offsets: Sequence[tuple[int, int]] | None = None,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> Plan:
        """A plan for clients that each send one flat buffer, all with the same layout.

        :meth:`rebind` then points it at the buffers of the next round without rebuilding::

            plan = Plan.flat(buffers, ref_A, ref_B)
            A, B = plan()
            ...
            plan.rebind(next_buffers)
            A, B = plan()

        Args:
            buffers: ``N`` contiguous 1-D tensors, one a client.
            offsets: for each layer where its ``A`` ``(r, k)`` and its ``B`` ``(d, r)`` begin, in
                elements; ``None``: ``A_0, B_0, A_1, B_1, ...`` without gaps. Every client has the
                ranks of the reference.
            ref_A, ref_B, weights, lam, align, proper, out: as for :class:`Plan`.

        Raises:
            ValueError, TypeError: as :class:`Plan`, or a buffer is not 1-D, contiguous and long
                enough; the message names the client.
        """
        shapes = checks.check(ref_A, ref_B, ref_A, ref_B, None, lam, align).shapes
        if offsets is None:
            sizes = [size for d, k, r in shapes for size in (r * k, d * r)]
            starts = list(itertools.accumulate(sizes, initial=0))
            offsets = list(zip(starts[:-1:2], starts[1::2], strict=True))
        if len(offsets) != len(shapes):
            raise ValueError(f"offsets must hold {len(shapes)} layers, got {len(offsets)}")
        for layer, pair in enumerate(offsets):
            if min(pair) < 0:
                raise ValueError(f"offsets must not be negative, got {pair} for layer {layer}")
        flat = Flat([], offsets, shapes)
        for client, buffer in enumerate(buffers):
            _check_buffer(buffer, client, flat.size, buffers[0])
        flat.buffers = [buffer.detach() for buffer in buffers]
        self = cls.__new__(cls)
        self._prepare((*flat.factors(), ref_A, ref_B), weights, lam, align, proper, out, flat)
        return self

    def rebind(self, buffers: Sequence[Tensor]) -> None:
        """Read the clients' factors from other flat buffers from now on; only after
        :meth:`flat`.

        On a GPU this is one small copy in the current stream, not a part of a captured graph: a
        graph that was captured from ``plan()`` follows it.

        Raises:
            ValueError, TypeError: there are not ``N`` of them, or one is not as :meth:`flat`
                wants it, of another device or dtype, or overlaps an output; with Triton also,
                one begins at a less round address than those that the plan was made with. The
                plan then stays with the buffers that it had.
        """
        if self._flat is None:
            raise ValueError("only a plan made by Plan.flat can be bound to other buffers")
        flat, spans = self._flat, self._output_spans
        if len(buffers) != len(flat.buffers):
            raise ValueError(f"buffers must be {len(flat.buffers)}, got {len(buffers)}")
        size = flat.size
        for client, buffer in enumerate(buffers):
            _check_buffer(buffer, client, size, flat.buffers[0])
            begin, end = _span(buffer)
            # Outputs are apart: of those that begin before `end`, the last one ends last.
            at = bisect.bisect_left(spans, (end, 0)) - 1
            if at >= 0 and spans[at][1] > begin:
                raise ValueError(f"buffers[{client}] must not overlap an output")
        kept, flat.buffers = flat.buffers, [buffer.detach() for buffer in buffers]
        try:
            self._runner.rebind()
        except ValueError:
            flat.buffers = kept
            raise

    def _prepare(self, factors, weights, lam, align, proper, out, flat) -> None:
        lora_A, lora_B, ref_A, ref_B = given = [list(tensors) for tensors in factors]
        for name, tensors in zip(NAMES, given, strict=True):
            _check_are_tensors(name, tensors)
        problem = checks.check(lora_A, lora_B, ref_A, ref_B, weights, lam, align)
        for name, tensors in zip(NAMES, given, strict=True):
            for index, t in enumerate(tensors):
                _check_memory(name, checks.place(name, index, problem.layers), t)
        if out is None:
            self.A, self.B = empty_outputs(ref_A, ref_B)
        else:
            self.A, self.B = _pair(out)
            _check_outputs(problem, self.A, self.B)
            inputs = [t for tensors in given for t in tensors]
            _check_overlap([*self.A, *self.B], inputs if weights is None else [*inputs, weights])
        # Aliases of our own: the memory lives as long as the plan, whatever becomes of the tensors.
        aliases = tuple([t.detach() for t in tensors] for tensors in given)
        weights = None if weights is None else weights.detach()
        self._flat = flat
        planner = _planners.get(problem.device.type, ThroughOperator)
        self._runner = planner(aliases, weights, self.A, self.B, lam, align, proper, flat)
        self._output_spans = sorted(_span(t) for t in [*self.A, *self.B])
        self._outputs = [t for t in [*self.A, *self.B] if not t.is_inference()]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Plan belongs to the memory of its tensors and cannot be copied or pickled; "
            "make one of the copied tensors"
        )

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fill the outputs from the current values; returns ``(A, B)``."""
        _mark_changed(self._outputs)
        self._runner.run()
        return self.A, self.B


def run_once(
    factors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
    A: list[Tensor],
    B: list[Tensor],
    lam: float,
    align: str,
    proper: bool,
) -> None:
    """``align_aggregate`` of ``lora_A, lora_B, ref_A, ref_B`` into ``A`` and ``B``.

    For a caller whose outputs stay while the clients change. Nothing checks the outputs: they must
    be contiguous, as :func:`~fedrot_kernels.tables.empty_outputs` makes them, and apart from all
    inputs. Fresh ones can cost more than the arithmetic, where the system has to find new pages.

    Raises:
        ValueError, TypeError: as ``align_aggregate``; the outputs then hold no result.
    """
    clients = itertools.chain(*factors[:2])
    planner = _planners.get(A[0].device.type) if all(map(_is_plain, clients)) else None
    (planner or ThroughOperator)(factors, None, A, B, lam, align, proper).run()


class ThroughOperator:
    """Runs where no backend plans."""

    def __init__(self, factors, weights, A, B, lam, align, proper, flat=None) -> None:
        self._factors, self._weights, self._flat = factors, weights, flat
        self._out = [*A, *B]
        self._options = {"lam": lam, "align": align, "proper": proper}

    def run(self) -> None:
        A, B = torch.ops.fedrot.align_aggregate(*self._factors, self._weights, **self._options)
        with torch.no_grad():
            for out, result in zip(self._out, [*A, *B], strict=True):
                out.copy_(result)

    def rebind(self) -> None:
        self._factors = (*self._flat.factors(), *self._factors[2:])


def _mark_changed(tensors: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except (AttributeError, TypeError):  # older torch: one at a time
        for t in tensors:
            torch.autograd.graph.increment_version(t)


def _is_plain(t: Tensor) -> bool:
    """Whether its values lie in memory as they are."""
    return type(t) in (Tensor, Parameter) and t.layout == torch.strided and not t.is_neg()


def _check_are_tensors(name: str, values: Sequence[object]) -> None:
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {type(value).__name__}")


def _pair(out: tuple[Sequence[Tensor], Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    if len(out) != 2:
        raise ValueError(f"out must be (A, B), two lists of tensors, got {len(out)} of them")
    A, B = (list(tensors) for tensors in out)
    _check_are_tensors("out A", A)
    _check_are_tensors("out B", B)
    return A, B


def _check_memory(name: str, where: str, t: Tensor) -> None:
    """A plan reads and writes the memory of ``t`` itself."""
    if not _is_plain(t):
        raise ValueError(f"{name} must be a plain dense tensor for {where}, got {_kind(t)}")
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise ValueError(
            f"{name} must have contiguous rows for {where}, got strides {tuple(t.stride())}: "
            "a plan would go on reading a copy; pass t.contiguous() and fill that"
        )


def _check_buffer(buffer: Tensor, client: int, size: int, like: Tensor) -> None:
    name = f"buffers[{client}]"
    if not isinstance(buffer, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(buffer).__name__}")
    if buffer.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, got {buffer.dtype}")
    if buffer.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {buffer.device}")
    if type(buffer) not in (Tensor, Parameter) or buffer.is_neg():
        raise ValueError(f"{name} must be a plain dense tensor, got {_kind(buffer)}")
    if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.shape[0] < size:
        raise ValueError(
            f"{name} must be contiguous, 1-D and hold {size} elements, got shape "
            f"{tuple(buffer.shape)}, strides {tuple(buffer.stride())}"
        )


def _kind(t: Tensor) -> str:
    return f"{type(t).__name__}, {t.layout}" + (", a negative view" if t.is_neg() else "")


def _check_outputs(problem: checks.Problem, A: list[Tensor], B: list[Tensor]) -> None:
    shapes_A = [(r, k) for _, k, r in problem.shapes]
    shapes_B = [(d, r) for d, _, r in problem.shapes]
    for name, tensors, shapes in (("out A", A, shapes_A), ("out B", B, shapes_B)):
        if len(tensors) != len(shapes):
            raise ValueError(f"{name} must hold {len(shapes)} layers, got {len(tensors)}")
        for layer, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
            where = f"layer {layer}"
            if t.dtype != problem.out_dtype:
                raise TypeError(f"{name} must be {problem.out_dtype}, got {t.dtype} for {where}")
            if t.device != problem.device:
                raise ValueError(f"{name} must be on {problem.device}, got {t.device} for {where}")
            if t.shape != shape:
                raise ValueError(f"{name} must be {shape} for {where}, got {tuple(t.shape)}")
            _check_memory(name, where, t)


def _check_overlap(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """One sweep over the bytes from the first to the last element of every tensor."""
    spans = [(*_span(t), True) for t in outputs] + [(*_span(t), False) for t in inputs]
    last, last_output = 0, 0  # ends of what has been passed
    for begin, end, is_output in sorted(spans):
        if begin < (last if is_output else last_output):
            raise ValueError("out must overlap neither an input nor another output")
        last = max(last, end)
        if is_output:
            last_output = max(last_output, end)
    for t in outputs:
        if t.shape[0] > 1 and t.stride(0) < t.shape[1]:
            raise ValueError(f"out must not overlap itself, got strides {tuple(t.stride())}")


def _span(t: Tensor) -> tuple[int, int]:
    steps = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (steps + 1) * t.element_size()
