"""``Plan``: the same ``align_aggregate`` on the same buffers, round after round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fedrot_kernels import ops

# (factors, weights, A, B, lam, align, proper) -> a function that fills A and B from the current
# values of the rest. The arguments are checked already.
Planner = Callable[..., Callable[[], None]]
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
        given = list(lora_A), list(lora_B), list(ref_A), list(ref_B)
        problem = ops.check(*given, weights, lam, align)
        for name, tensors in zip(NAMES, given, strict=True):
            for index, t in enumerate(tensors):
                _check_memory(name, ops.place(name, index, problem.layers), t)
        if out is None:
            contiguous = torch.contiguous_format
            self.A = [torch.empty_like(t, memory_format=contiguous) for t in given[2]]
            self.B = [torch.empty_like(t, memory_format=contiguous) for t in given[3]]
        else:
            self.A, self.B = (list(tensors) for tensors in out)
            _check_outputs(problem, self.A, self.B)
            inputs = [t for tensors in given for t in tensors]
            _check_overlap([*self.A, *self.B], inputs if weights is None else [*inputs, weights])
        # Aliases of our own: the memory lives as long as the plan, whatever becomes of the tensors.
        factors = [[t.detach() for t in tensors] for tensors in given]
        planner = _planners.get(problem.device.type, _through_operator)
        weights = None if weights is None else weights.detach()
        self._run = planner(factors, weights, self.A, self.B, lam, align, proper)
        self._outputs = [t for t in [*self.A, *self.B] if not t.is_inference()]

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fill the outputs from the current values; returns ``(A, B)``."""
        _mark_changed(self._outputs)
        self._run()
        return self.A, self.B


def _through_operator(factors, weights, A, B, lam, align, proper) -> Callable[[], None]:
    def run() -> None:
        results = torch.ops.fedrot.align_aggregate(
            *factors, weights, lam=lam, align=align, proper=proper
        )
        with torch.no_grad():
            for out, result in zip([*A, *B], [*results[0], *results[1]], strict=True):
                out.copy_(result)

    return run


def _mark_changed(tensors: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except (AttributeError, TypeError):  # older torch: one at a time
        for t in tensors:
            torch.autograd.graph.increment_version(t)


def _check_memory(name: str, where: str, t: Tensor) -> None:
    """A plan reads and writes the memory of ``t`` itself."""
    if type(t) not in (Tensor, Parameter) or t.layout != torch.strided or t.is_neg():
        raise ValueError(f"{name} must be a plain dense tensor for {where}, got {_kind(t)}")
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise ValueError(
            f"{name} must have contiguous rows for {where}, got strides {tuple(t.stride())}: "
            "a plan would go on reading a copy; pass t.contiguous() and fill that"
        )


def _kind(t: Tensor) -> str:
    return f"{type(t).__name__}, {t.layout}" + (", a negative view" if t.is_neg() else "")


def _check_outputs(problem: ops.Problem, A: list[Tensor], B: list[Tensor]) -> None:
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
