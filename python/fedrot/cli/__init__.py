"""The command line. Commands import torch, peft and matplotlib when they run, not before."""

from __future__ import annotations

import typer

from fedrot import __version__
from fedrot.cli.aggregate import aggregate
from fedrot.cli.bench import bench
from fedrot.cli.compare import compare
from fedrot.cli.inspect import inspect
from fedrot.cli.sweep import sweep
from fedrot.cli.train import train

app = typer.Typer(
    name="fedrot",
    help="Federated LoRA with rotational alignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fedrot {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


for _command in (aggregate, inspect, train, compare, sweep, bench):
    app.command()(_command)


def main() -> None:
    """Entry point of the ``fedrot`` script."""
    app()
