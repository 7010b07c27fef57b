"""How every command ends when the user's input is wrong."""

from __future__ import annotations

import functools
import inspect
import shlex
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.models import OptionInfo


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
    hints = typing.get_type_hints(command, include_extras=True)
    options = {
        name
        for name, hint in hints.items()
        if any(isinstance(part, OptionInfo) for part in getattr(hint, "__metadata__", ()))
    }
    signature = inspect.signature(command)

    def told(error: Exception, given: dict[str, Any]) -> str:
        if isinstance(error, OSError) and error.filename and error.strerror:
            return f"{error.filename}: {error.strerror}"
        text = str(error)
        name, must, _ = text.partition(" must ")
        # KEY=VALUE may have the same name.
        if not must or name not in options:
            return text
        default = signature.parameters[name].default
        return f"--{text}" if given.get(name, default) != default else text

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            typer.echo(
                f"fedrot: {told(error, signature.bind(*args, **kwargs).arguments)}", err=True
            )
            raise typer.Exit(1) from error

    return run
