"""How every command ends when the user's input is wrong."""

from __future__ import annotations

import functools
import inspect
import shlex
import shutil
import sys
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

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            given = inspect.signature(command).bind(*args, **kwargs).arguments
            typer.echo(f"fedrot: {_told(error, command, given)}", err=True)
            raise typer.Exit(1) from error

    return run


def _told(error: Exception, command: Callable[..., Any], given: dict[str, Any]) -> str:
    """The error's text, with the file where it is the system's, and the option where it begins
    with one that was ``given``: KEY=VALUE may have the same name."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    name, must, _ = text.partition(" must ")
    option = inspect.signature(command, eval_str=True).parameters.get(name)
    parts = getattr(option and option.annotation, "__metadata__", ())
    if not must or not option or not any(isinstance(part, OptionInfo) for part in parts):
        return text
    return f"--{text}" if given.get(name, option.default) != option.default else text
