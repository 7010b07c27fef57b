"""``StreamingAggregator``: align and average clients one by one, in memory that does not grow."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedrot.factors import Factors, by_name, check_factors
from fedrot_kernels import checks
from fedrot_kernels.plan import run_once
from fedrot_kernels.tables import empty_outputs

# So many clients are summed in float32 (float64 for a float64 reference) before they go into a
# float64 mean. float32 alone loses digits over 10^6 clients; float64 alone makes every client cost
# a fifth to a third more (docs/streaming.md).
BLOCK = 64
# Weights within a block are relative to its first; one larger by more than this opens a new block.
RATIO = 2.0**20
# On top of that a block is scaled down, so that no sum of finite values overflows. What float32
# loses by it are values below 1e-30.
SHRINK = 1 / (RATIO * BLOCK)

COUNTS = ("weight", "clients", "dropped")  # of a state


class StreamingAggregator:
    """``torch.ops.fedrot.align_aggregate`` for clients that arrive one at a time.

    It holds the reference, one client, a sum and a mean, however many clients it has seen. The
    result does not depend on their order, nor on how they are spread over aggregators that are
    merged, but for rounding::

        aggregator = StreamingAggregator(reference)
        for client, examples in uploads:
            aggregator.accept(client, examples)
        factors = aggregator.finish()

    Args:
        reference: the factors from which the clients started the round; copied.
        lam, align, proper: as for :func:`fedrot_kernels.align_aggregate`.
        nonfinite: what becomes of a client with values that are not finite, or whose aligned
            factors overflow: ``"raise"`` a ``ValueError``, or ``"drop"`` it with a
            ``RuntimeWarning`` that names it.
        bound: a client that changes the reference by more, over all layers together and after its
            rotation, is shortened to this (norm clipping, arXiv 1911.07963), as by the method
            ``robust`` with ``rule="clip"``. Infinity: none is.

    One thread at a time; threads and processes take an aggregator each, and :meth:`merge`.

    Raises:
        ValueError: an option is unknown, or the reference is no adapter: no layers, shapes that do
            not fit, values that are not finite.
        TypeError: the reference has an unsupported or mixed dtype.

    Source: arXiv 2602.23638.
    """

    def __init__(
        self,
        reference: Factors,
        *,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        nonfinite: str = "raise",
        bound: float = math.inf,
    ) -> None:
        if nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be raise or drop, got {nonfinite!r}")
        checks.check_number("bound", bound)
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        if not check_factors(reference, "reference").A:
            raise ValueError("reference: there must be at least one layer")
        self._layers = list(reference.A)
        given = list(reference.A.values()), list(reference.B.values())
        try:
            problem = checks.check(*given, *given, None, lam, align)
            checks.check_finite(len(self._layers), ref_A=given[0], ref_B=given[1])
        except (ValueError, TypeError) as error:
            raise self._by_name(error, "reference") from None
        self._options: dict[str, Any] = {"lam": float(lam), "align": align, "proper": bool(proper)}
        self._nonfinite, self._bound = nonfinite, float(bound)
        self._dtype = problem.out_dtype
        # The operator rounds its result to the dtype of the reference. Here that would be once a
        # client, so the reference is widened to what is accumulated in.
        ref_A, ref_B = (
            [t.detach().to(problem.compute_dtype, copy=True).contiguous() for t in side]
            for side in given
        )
        self._reference = ref_A, ref_B
        self._aligned = empty_outputs(*self._reference)  # of the client at hand
        self._total = _Mean(self._like())
        self._clients = self._dropped = 0
        self._fingerprint: Tensor | None = None

    @property
    def clients(self) -> int:
        """How many were accepted; those that were dropped do not count."""
        return self._clients

    @property
    def dropped(self) -> int:
        """How many were left out since they were not finite."""
        return self._dropped

    @property
    def weight(self) -> float:
        """The sum of the weights of those accepted."""
        return self._total.weight

    def accept(self, client: Factors, weight: float = 1.0, *, name: object = None) -> bool:
        """Align one client and add it.

        Args:
            client: the layers of the reference, in any order; ``A`` ``(r_i, k)`` and ``B``
                ``(d, r_i)`` with ``r_i`` up to the rank of the reference, in any of the operator's
                dtypes, on the device of the reference. Neither modified nor kept.
            weight: finite and non-negative, as the number of examples; need not be normalised.
            name: how messages call the client; its number, from 0, if not given.

        Returns:
            Whether the client counts: ``False`` where it was dropped.

        Raises:
            ValueError: the weight, a layer, a shape or a device is wrong, or (with
                ``nonfinite="raise"``) a value is not finite; the message names client and layer.
            TypeError: a dtype is unsupported or mixed, or the client is no ``Factors``.

        After an error the aggregator is as it was before.
        """
        name = f"client {self._clients + self._dropped if name is None else name}"
        check_factors(client, name)
        checks.check_number(f"{name}: weight", weight)
        weight = float(weight)
        if not (weight >= 0.0 and math.isfinite(self.weight + weight)):
            raise ValueError(f"{name}: weight must be non-negative with a finite sum, got {weight}")
        lora_A, lora_B = self._in_order(client, name)
        A, B = self._aligned
        try:
            run_once((lora_A, lora_B, *self._reference), A, B, **self._options)
            if A[0].device.type != "cpu":  # there the operator itself looks
                _check_finite([*A, *B])
        except (ValueError, TypeError) as error:
            self._refuse(lora_A, lora_B, error, name)
            return False
        if self._bound < math.inf:
            _clip([*A, *B], self._like(), self._bound)
        self._total.add([*A, *B], weight)
        self._clients += 1
        return True

    def merge(self, other: StreamingAggregator | Mapping[str, Tensor]) -> None:
        """Add the clients of another aggregator, which stays as it is, or those of its
        :meth:`state_dict`: how aggregators make a tree.

        Raises:
            ValueError: it has another reference or other options, or a state is not as for
                :meth:`load_state_dict`. The aggregator is then as it was.
        """
        if isinstance(other, StreamingAggregator):
            mine, theirs = self._settings(), other._settings()
            if theirs != mine:
                raise ValueError(f"aggregators must have the same options, got {mine}, {theirs}")
            other = other.state_dict()
        mean, weight, clients, dropped = self._read(other)
        if not math.isfinite(self.weight + weight):
            raise ValueError(f"weights must have a finite sum, got {self.weight} and {weight}")
        self._total.join(mean, weight)
        self._clients += clients
        self._dropped += dropped

    def mean(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The weighted mean so far: ``A`` of every layer, then ``B`` of every layer; copies.

        Zero where there is no weight yet.
        """
        return [t.to(dtype, copy=True) for t in self._total.settled()]

    def finish(self) -> Factors:
        """The average of all clients so far, in the dtype of the reference, its layers in order.

        The aggregator stays as it is and can go on.

        Raises:
            ValueError: there are no clients, their weights are all zero, or the result overflows.
        """
        check_total(self.clients, self.weight)
        return self.as_factors(self.mean(self._dtype))

    def as_factors(self, mean: list[Tensor]) -> Factors:
        """What :meth:`mean` gives, in the dtype of the reference.

        Raises:
            ValueError: a value overflows.
        """
        tensors = [t.to(self._dtype) for t in mean]
        _check_finite(tensors)
        count = len(self._layers)
        return Factors(
            dict(zip(self._layers, tensors[:count], strict=True)),
            dict(zip(self._layers, tensors[count:], strict=True)),
        )

    def fingerprint(self) -> Tensor:
        """``(32,)`` uint8 on the CPU: SHA-256 of reference and options. What agrees in it can be
        merged, also across processes."""
        if self._fingerprint is None:
            settings = sorted(self._settings().items())
            digest = hashlib.sha256(repr((self._layers, settings)).encode())
            for t in self._like():
                digest.update(repr((t.dtype, tuple(t.shape))).encode())
                digest.update(t.cpu().contiguous().numpy().data)
            self._fingerprint = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        return self._fingerprint

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but reference and options, which are there as :meth:`fingerprint`. The
        tensors share no memory: ``safetensors.torch.save_file`` takes them."""
        return {
            **dict(zip(self._keys(), self.mean(), strict=True)),
            **{key: torch.tensor(getattr(self, key), dtype=torch.float64) for key in COUNTS},
            "fingerprint": self.fingerprint().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state_dict` instead of the present state.

        Raises:
            ValueError: a tensor is missing, unknown, not finite or of another shape, or the state
                was made with another reference or other options. The aggregator is then as it was.
        """
        mean, weight, clients, dropped = self._read(state)
        total = _Mean(self._like())
        total.join(mean, weight)
        self._total, self._clients, self._dropped = total, clients, dropped

    def _read(self, state: Mapping[str, Tensor]) -> tuple[list[Tensor], float, int, int]:
        """Mean, weight, clients, dropped of a checked state, the mean on the own device."""
        keys, like = self._keys(), self._like()
        wanted = {*keys, *COUNTS, "fingerprint"}
        if state.keys() != wanted:
            raise ValueError(
                f"state must be that of state_dict: missing {sorted(wanted - state.keys())}, "
                f"unknown {sorted(state.keys() - wanted)}"
            )
        if not torch.equal(state["fingerprint"].cpu(), self.fingerprint()):
            raise ValueError("aggregators must have the same reference and options")
        shapes = dict(zip(keys, (t.shape for t in like), strict=True))
        for key, shape in (shapes | dict.fromkeys(COUNTS, torch.Size())).items():
            if state[key].shape != shape:
                raise ValueError(
                    f"state {key} must be {tuple(shape)}, got {tuple(state[key].shape)}"
                )
            if key in shapes and not bool(torch.isfinite(state[key]).all()):
                raise ValueError(f"state {key} holds a value that is not finite")
        weight, clients, dropped = (float(state[key]) for key in COUNTS)
        for key, value in zip(COUNTS, (weight, clients, dropped), strict=True):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"state {key} must be non-negative and finite, got {value}")
        mean = [state[key].to(like[0].device, torch.float64) for key in keys]
        return mean, weight, int(clients), int(dropped)

    def _settings(self) -> dict[str, Any]:
        """What the mean depends on beside the reference."""
        return {**self._options, "bound": self._bound}

    def _like(self) -> list[Tensor]:
        ref_A, ref_B = self._reference
        return [*ref_A, *ref_B]

    def _keys(self) -> list[str]:
        return [f"mean/{side}/{layer}" for side in "AB" for layer in self._layers]

    def _in_order(self, client: Factors, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The client's tensors in the order of the reference's layers."""
        try:
            lora = [client.A[m] for m in self._layers], [client.B[m] for m in self._layers]
        except KeyError as error:
            raise ValueError(f"{name}: there is no layer {error.args[0]}") from None
        if len(client.A) != len(self._layers):
            unknown = next(m for m in client.A if m not in self._layers)
            raise ValueError(f"{name}: the reference has no layer {unknown}")
        return lora

    def _refuse(
        self, lora_A: list[Tensor], lora_B: list[Tensor], error: Exception, name: str
    ) -> None:
        """Raise what is wrong with a client, or drop it."""
        try:
            ref_A, ref_B = self._reference
            checks.check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
        except (ValueError, TypeError) as found:
            raise self._by_name(found, name) from None
        # So it is the values; on a GPU only the result has been looked at.
        try:
            checks.check_finite(len(self._layers), lora_A=lora_A, lora_B=lora_B)
        except ValueError as found:
            error = found
        error = self._by_name(error, name)
        if self._nonfinite == "raise":
            raise error from None
        warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=3)
        self._dropped += 1

    def _by_name(self, error: Exception, who: str) -> Exception:
        """The operator's error with layers by name, and ``who`` for its client 0."""
        named = by_name(error, self._layers)
        return type(error)(f"{who}: {str(named).replace('client 0, ', '')}")


class _Mean:
    """A weighted mean of lists of tensors, as exact as one of them."""

    def __init__(self, like: list[Tensor]) -> None:
        self._mean = [torch.zeros_like(t, dtype=torch.float64) for t in like]
        self._mean_weight = 0.0
        # The open block: the sum of SHRINK * weight / unit * tensor.
        self._sum = [torch.zeros_like(t) for t in like]
        self._sum_weight = 0.0
        self._unit = 0.0
        self._count = 0

    @property
    def weight(self) -> float:
        return self._mean_weight + self._sum_weight

    def add(self, tensors: list[Tensor], weight: float) -> None:
        if weight == 0.0:
            return
        if self._count == BLOCK or weight > RATIO * self._unit:
            self.settled()
            self._unit = weight
        torch._foreach_add_(self._sum, tensors, alpha=SHRINK * (weight / self._unit))
        self._sum_weight += weight
        self._count += 1

    def join(self, mean: list[Tensor], weight: float) -> None:
        """Add what has this mean and this weight."""
        self.settled()
        if weight > 0.0:
            self._blend(mean, 1.0, weight)

    def settled(self) -> list[Tensor]:
        """The mean in float64, the open block closed into it; not a copy."""
        if self._count:
            self._blend(self._sum, self._unit / self._sum_weight / SHRINK, self._sum_weight)
            torch._foreach_zero_(self._sum)
            self._sum_weight = self._unit = 0.0
            self._count = 0
        return self._mean

    def _blend(self, tensors: list[Tensor], scale: float, weight: float) -> None:
        """Add what has the mean ``scale * tensors`` and this weight."""
        total = self._mean_weight + weight
        torch._foreach_mul_(self._mean, self._mean_weight / total)
        torch._foreach_add_(self._mean, tensors, alpha=scale * (weight / total))
        self._mean_weight = total


def check_total(clients: int, weight: float) -> None:
    """Raise ValueError where there is nothing to average."""
    if clients == 0:
        raise ValueError("there must be at least one client to average")
    if weight == 0.0:
        raise ValueError(f"weights must have a positive sum, all {clients} are zero")


def _check_finite(tensors: list[Tensor]) -> None:
    """One wait for the device, not one a tensor."""
    largest = torch._foreach_norm(tensors, ord=float("inf"))
    if not bool(torch.isfinite(torch.stack(largest)).all()):
        raise ValueError(checks.OVERFLOW)


def _clip(tensors: list[Tensor], reference: list[Tensor], bound: float) -> None:
    """Shorten what all tensors together differ from the reference by to the bound; in place."""
    torch._foreach_sub_(tensors, reference)
    norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    # Where the length is 0 there is nothing to shorten.
    torch._foreach_mul_(tensors, (bound / norms.norm()).clamp(max=1).to(tensors[0].dtype))
    torch._foreach_add_(tensors, reference)
