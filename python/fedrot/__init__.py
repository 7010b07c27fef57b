"""Federated LoRA with rotational alignment (FedRot-LoRA, arXiv 2602.23638)."""

__version__ = "0.1.0"
