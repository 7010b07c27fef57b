"""Where an interrupted run goes on: everything the server keeps between rounds, in one file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrot.errors import FedrotError
from fedrot.factors import Factors
from fedrot.files import new_file
from fedrot.methods import Server

Tensors = dict[str, Tensor]


def save(path: Path, server: Server) -> None:
    tensors = {
        **_global(server),
        **_under("merged", server.merged),
        **_under("optimizer", server.optimizer),
    }
    for client, head in server.heads.items():
        tensors.update(_under(f"heads/{client}", head))
    for i, past in enumerate(server.past):
        tensors.update(_under(f"past/{i}", _global(past)))
    for client, B in server.personal.items():
        tensors.update(_under(f"personal/{client}", B))
    # The file takes no tensor that shares memory with another, as the first B of two rounds.
    tensors = {key: t.detach().clone().contiguous() for key, t in tensors.items()}
    with new_file(path) as fresh:
        numbers = {"rounds": str(server.rounds), "past": str(len(server.past))}
        ranks = json.dumps(list(server.ranks.items()))
        metadata = {**numbers, "modules": json.dumps(list(server.factors.A)), "ranks": ranks}
        save_file(tensors, fresh, metadata=metadata)


def load(path: Path) -> Server:
    """Read a checkpoint.

    Raises:
        FedrotError: the file is corrupt.
    """
    try:
        with safe_open(path, "pt") as file:
            rounds, kept = int(file.metadata()["rounds"]), int(file.metadata()["past"])
            modules = json.loads(file.metadata()["modules"])  # in order; the file sorts its keys
            ranks = dict(json.loads(file.metadata().get("ranks", "[]")))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        personal = {
            client: {m: B[m] for m in modules}
            for client, B in _of_clients(_of("personal", tensors)).items()
        }
        factors, head = _read_global(modules, tensors)
        past = []
        for i in range(kept):
            old, old_head = _read_global(modules, _of(f"past/{i}", tensors))
            past.append(Server(old, rounds - 1 - i, head=old_head))
        return Server(
            factors,
            rounds,
            tuple(past),
            _of("merged", tensors),
            personal,
            head,
            _of_clients(_of("heads", tensors)),
            _of("optimizer", tensors),
            ranks,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FedrotError(f"{path}: corrupt checkpoint ({error}); --force starts again") from error


def _global(server: Server) -> Tensors:
    """What clients download: factors and head."""
    A, B = _under("factors/A", server.factors.A), _under("factors/B", server.factors.B)
    return {**A, **B, **_under("head", server.head)}


def _read_global(modules: list[str], tensors: Tensors) -> tuple[Factors, Tensors]:
    found = _of("factors", tensors)
    A, B = ({m: found[f"{side}/{m}"] for m in modules} for side in "AB")
    return Factors(A, B), _of("head", tensors)


def _of_clients(tensors: Tensors) -> dict[int, Tensors]:
    clients = sorted({int(key.partition("/")[0]) for key in tensors})
    return {client: _of(str(client), tensors) for client in clients}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}/{name}": t for name, t in tensors.items()}


def _of(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors under a prefix, without it."""
    start = f"{prefix}/"
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
