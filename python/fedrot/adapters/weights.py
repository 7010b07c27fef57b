"""The value of `--weights`: `3,1`, or a JSON file with a list or an object by folder name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrot.errors import FedrotError


def parse_weights(value: str | None, clients: Sequence[Path]) -> list[float] | None:
    """One weight for each client, in their order; None for None.

    Raises:
        FedrotError: where a value is no number, or the values do not match the clients.
    """
    if value is None:
        return None
    if value.endswith(".json"):
        return _from_json(Path(value), clients)
    return _in_order([_number(part.strip(), "--weights") for part in value.split(",")], clients)


def _from_json(file: Path, clients: Sequence[Path]) -> list[float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError as error:
        raise FedrotError(f"--weights {file}: no such file") from error
    except ValueError as error:
        raise FedrotError(f"--weights {file}: not valid JSON ({error})") from error
    if isinstance(content, list):
        return _in_order([_number(w, f"--weights {file}") for w in content], clients)
    if not isinstance(content, dict):
        raise FedrotError(f"--weights {file}: must hold a list or an object")
    return _by_name(content, file, [client.name or client.resolve().name for client in clients])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these, in which no name stands twice: JSON would take the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return content


def _by_name(content: dict[str, Any], file: Path, names: list[str]) -> list[float]:
    for name in names:
        if names.count(name) > 1:
            raise FedrotError(f"--weights {file}: two adapters are called {name!r}; give a list")
        if name not in content:
            raise FedrotError(f"--weights {file}: no weight for {name!r}")
    for name in content:
        if name not in names:
            raise FedrotError(f"--weights {file}: {name!r} is none of the adapters")
    return [_number(content[name], f"--weights {file}, {name!r}") for name in names]


def _in_order(weights: list[float], clients: Sequence[Path]) -> list[float]:
    if len(weights) != len(clients):
        raise FedrotError(f"--weights: {len(weights)} values for {len(clients)} adapters")
    return weights


def _number(value: Any, where: str) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise FedrotError(f"{where}: {value!r} is not a number")
