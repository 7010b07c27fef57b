"""How every command ends when the user's input is wrong."""

from __future__ import annotations

import functools
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


def program() -> str:
    """How to call this program again: ``fedrot``, or its path where it is not on ``PATH``."""
    called = Path(sys.argv[0])
    if called.name != "fedrot" or shutil.which("fedrot"):
        return "fedrot"
    return shlex.quote(str(called))


def listed(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def user_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error in the user's input into one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            typer.echo(f"fedrot: {error}", err=True)
            raise typer.Exit(1) from error

    return run
