"""How the command line speaks of itself."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer

from fedrot.cli._run import program, user_errors


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


def test_an_error_names_the_option_and_the_file(capsys, tmp_path):
    @user_errors
    def command(
        layers: Annotated[list[str], typer.Argument()], lam: Annotated[str, typer.Option()] = "1"
    ) -> None:
        if lam == "file":
            (tmp_path / "none.yaml").read_text()
        raise ValueError(layers[0])

    def told(*args: object) -> str:
        with pytest.raises(typer.Exit):
            command(*args)
        return capsys.readouterr().err

    text = "lam must lie in [0, 1], got 2"
    assert told([text], "2") == f"fedrot: --{text}\n"
    assert told([text]) == f"fedrot: {text}\n"  # from elsewhere, as KEY=VALUE
    assert told(["lam: must"]) == "fedrot: lam: must\n"
    assert told(["layers must be 2"]) == "fedrot: layers must be 2\n"  # no option
    assert told([], "file") == f"fedrot: {tmp_path / 'none.yaml'}: No such file or directory\n"
