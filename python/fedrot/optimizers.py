"""Server optimizers (FedOpt, arXiv 2003.00295): the averaged parameters as a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrot.options import option

ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")


@dataclass(frozen=True)
class ServerOptimizer:
    """The step from the last global parameters toward the aggregate: their difference is the
    gradient, ``optimizer`` one of PyTorch's.

    ``fedavg`` with ``lr: 1`` takes the aggregate as it is. ``lr: null`` is 1 for ``fedavg`` and
    ``fedavgm``, 0.01 for the adaptive ones, whose step does not shrink with the gradient.
    ``momentum`` is of ``fedavgm``; ``beta1``, ``beta2`` of ``fedadam`` and ``fedyogi``; ``eps`` of
    the adaptive ones (the paper's tau). Not as in the paper but as PyTorch does: Adam and Yogi
    correct the bias of their moments, second moments start from 0, Adagrad has no momentum.
    """

    optimizer: str = option("fedavg", choices=("fedavg", "fedavgm", *ADAPTIVE))
    lr: float | None = option(None, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    beta1: float = option(0.9, at_least=0, below=1)
    beta2: float = option(0.99, at_least=0, below=1)
    eps: float = option(1e-3, above=0)

    @property
    def plain(self) -> bool:
        """Whether the step ends in the aggregate itself."""
        return self.optimizer == "fedavg" and self.rate == 1

    @property
    def rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return 0.01 if self.optimizer in ADAPTIVE else 1.0

    def step(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The new parameters, and the optimizer's state under ``<kind>/<parameter>``.

        Parameters of which ``state`` knows but ``before`` does not keep their state.
        """
        if self.plain:
            return dict(after), {}
        parameters = {name: t.detach().clone() for name, t in before.items()}
        optimizer = self._build(parameters.values())
        for name, parameter in parameters.items():
            parameter.grad = before[name] - after[name]
            saved = {
                key.partition("/")[0]: value.clone()
                for key, value in state.items()
                if key.partition("/")[2] == name
            }
            optimizer.state[parameter].update(saved)
        optimizer.step()
        fresh = {
            f"{kind}/{name}": value
            for name, parameter in parameters.items()
            for kind, value in optimizer.state[parameter].items()
            if value is not None
        }
        for parameter in parameters.values():
            parameter.grad = None
        return parameters, {**state, **fresh}

    def _build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "fedavg": lambda: torch.optim.SGD(parameters, self.rate),
            "fedavgm": lambda: torch.optim.SGD(parameters, self.rate, momentum=self.momentum),
            "fedadam": lambda: torch.optim.Adam(parameters, self.rate, betas, self.eps),
            "fedyogi": lambda: Yogi(parameters, self.rate, betas, self.eps),
            "fedadagrad": lambda: torch.optim.Adagrad(parameters, self.rate, eps=self.eps),
        }
        return kinds[self.optimizer]()


class Yogi(torch.optim.Optimizer):
    """Adam whose second moment moves by the sign of its error (Zaheer et al., NeurIPS 2018):
    ``v <- v - (1 - beta2) sign(v - g^2) g^2``."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                g, state = p.grad, self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
                m.lerp_(g, 1 - beta1)
                square = g.square()
                v.sub_((1 - beta2) * (v - square).sign() * square)
                size = group["lr"] / (1 - beta1**step)
                p.addcdiv_(m, (v / (1 - beta2**step)).sqrt() + group["eps"], value=-size)
