"""A federation on several processes: every rank trains its share of the clients.

    torchrun --standalone --nproc-per-node 2 examples/distributed/train.py

On GPUs, one a rank, add ``--backend nccl``. A small network that has learned the digits 0 to 4 is
adapted to 5 to 9 by ten clients with LoRA (PEFT). The clients are the same however many processes
train them, and so is the result but for rounding.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedrot.distributed import align_aggregate
from fedrot.simulation.adapter import draw_factors, get_factors, set_factors
from fedrot.tasks.partition import dirichlet

CLIENTS = 10
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2", "4"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    options = parser.parse_args()
    dist.init_process_group(options.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float().div(16).to(device)
    old, new = (labels < 5).nonzero().flatten(), (labels >= 5).nonzero().flatten()
    model = get_peft_model(pretrained(images[old], labels[old].to(device)), LORA)
    train, test = new[::2], new[1::2]
    shards = dirichlet(labels[train], CLIENTS, alpha=0.5, seed=0)
    labels = labels.to(device)

    def uploads():
        """This rank's clients, trained when their turn comes: the aggregator holds none of them."""
        for client in range(rank, CLIENTS, ranks):
            mine = train[shards[client]]
            fit(set_factors(model, factors), images[mine], labels[mine], steps=10)
            yield get_factors(model), len(mine)

    factors = draw_factors(model, torch.Generator(device).manual_seed(0))
    for round in range(options.rounds):
        factors = align_aggregate(uploads(), factors)
        with torch.no_grad():
            right = set_factors(model, factors)(images[test]).argmax(1) == labels[test]
        if rank == 0:
            print(f"round {round + 1}: accuracy {right.float().mean():.3f}", flush=True)
    dist.destroy_process_group()


def pretrained(images: Tensor, labels: Tensor) -> nn.Module:
    """The same network on every rank, as it starts from one seed."""
    torch.manual_seed(0)
    wide = 128
    model = nn.Sequential(
        nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10)
    ).to(images.device)
    return fit(model, images, labels, steps=100, lr=0.01)


def fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float = 0.02):
    """Adam on all examples at once."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    main()
