"""Federated LoRA methods: small frozen objects, from uploads to global factors."""

from fedrot.methods.averaging import FedIT, FedSALoRA, FFALoRA, HetLoRA, RoLoRA
from fedrot.methods.base import Method, Server, residual
from fedrot.methods.exact import FedExLoRA, FlexLoRA, FLoRA
from fedrot.methods.fair import LoRAFAIR
from fedrot.methods.fedrot import FedRot
from fedrot.methods.robust import Robust

# By the names of the command line and the configuration.
METHODS: dict[str, type[Method]] = {
    "fedit": FedIT,
    "ffa": FFALoRA,
    "rolora": RoLoRA,
    "hetlora": HetLoRA,
    "fedsa": FedSALoRA,
    "flexlora": FlexLoRA,
    "fedex": FedExLoRA,
    "flora": FLoRA,
    "lora-fair": LoRAFAIR,
    "fedrot": FedRot,
    "robust": Robust,
}

__all__ = [
    "METHODS",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedIT",
    "FedRot",
    "FedSALoRA",
    "FlexLoRA",
    "HetLoRA",
    "LoRAFAIR",
    "Method",
    "RoLoRA",
    "Robust",
    "Server",
    "residual",
]
