"""The base model of the tests is pre-trained once per session, never in the user's cache."""

from __future__ import annotations

import pytest

from fedrot.simulation import rounds


@pytest.fixture(scope="module", autouse=True)
def small_model(one_thread):
    """Everything here trains on one thread."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEDROT_CACHE", str(folder))
        yield folder


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(2)`: the second training from now on is interrupted, once."""
    real = rounds.train_clients

    def at(call):
        calls = []

        def train(*args, **options):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(rounds, "train_clients", train)

    return at
