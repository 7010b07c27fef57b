"""A federation small enough for tests: its options, and what several tests do with it."""

import torch

from fedrot.config import load
from fedrot.options import merge, parse_overrides

SMALL_ONE_SHOT = [
    "task.pretrain_steps=60",
    "clients.count=4",
    "local.steps=3",
    "local.batch_size=8",
]
SMALL = [*SMALL_ONE_SHOT, "rounds=3"]


def small(method="fedit", *options, setting="rounds"):
    base = SMALL_ONE_SHOT if setting == "one-shot" else SMALL
    chosen = {"setting": setting, "method": {"name": method}}
    return load(merge(chosen, parse_overrides([*base, *options])))


def equal(a, b):
    """Whether two dictionaries of tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
