"""How the command line speaks of itself."""

from __future__ import annotations

import pytest

from fedrot.cli._run import program


@pytest.mark.parametrize(
    ("argv", "on_path", "expected"),
    [
        (".venv/bin/fedrot", False, ".venv/bin/fedrot"),
        ("my env/bin/fedrot", False, "'my env/bin/fedrot'"),
        (".venv/bin/fedrot", True, "fedrot"),
        ("__main__.py", False, "fedrot"),
    ],
)
def test_program_is_what_the_user_can_type(monkeypatch, argv, on_path, expected):
    monkeypatch.setattr("sys.argv", [argv])
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if on_path else None)
    assert program() == expected
