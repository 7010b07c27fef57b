"""The task of both apps: data, base model, adapter and partition, from fedrot's own simulation."""

from __future__ import annotations

from flwr.app import Context

from fedrot.config import load
from fedrot.simulation.rounds import Federation, prepare


def federation(context: Context) -> Federation:
    """Real data that scikit-learn ships, and a small ViT that is pre-trained once and cached."""
    options = context.run_config
    return prepare(
        load(
            {
                "seed": options["seed"],
                "clients": {"count": options["clients"]},
                "local": {"steps": options["steps"]},
            }
        )
    )
