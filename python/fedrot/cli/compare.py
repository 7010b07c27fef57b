"""`fedrot compare`: several methods over the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedrot.cli._run import listed, program, user_errors
from fedrot.progress import progress

if TYPE_CHECKING:
    from fedrot.results import Comparison


@user_errors
def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Options, as in local.lr=0.1.", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; with options of their own as fedrot:lam=0.5.")
    ] = "fedit,fedrot",
    settings: Annotated[str, typer.Option(help="Comma-separated.")] = "rounds,regauge,one-shot",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    task: Annotated[
        str | None, typer.Option(help="digits (default), strings, text, sst2, ...")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the comparison.")
    ] = Path("runs/compare"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs already there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier runs.")] = False,
    log: Annotated[
        str, typer.Option(help="tensorboard, wandb, or both: they get the metrics too.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Compare methods on the same data, start and uploads: mean and std over seeds."""
    from fedrot.hub import look_for
    from fedrot.options import merge, nested, parse_overrides, read_yaml

    options = merge(
        read_yaml(config) if config else {},
        nested("task.name", task) if task else {},
        parse_overrides(overrides or []),
    )
    look_for(options.get("task"))  # before torch is imported, which takes seconds

    from fedrot.simulation import comparison

    variants = [comparison.parse_variant(text) for text in listed(methods)]
    with progress(quiet) as track:
        result = comparison.compare(
            variants,
            listed(settings),
            range(seed, seed + seeds),
            options,
            output,
            resume=resume,
            force=force,
            log=listed(log),
            track=track,
        )
    if not quiet:
        _print_result(result, output, comparison.merge_command(result, program()))


def _print_result(result: Comparison, output: Path, merge_command: str | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from fedrot.report.pages import comparison_table, findings

    header, rows = comparison_table(result)
    seeds = len(result.seeds)
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"{result.task}; {seeds} seed{'s' * (seeds > 1)}"
    )
    for index, column in enumerate(header):
        number = index >= 2  # where the table is too wide, names are broken, not numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1][0] != row[0]
        repeated = index > 0 and rows[index - 1][0] == row[0]
        table.add_row("" if repeated else row[0], *row[1:], end_section=last)
    console = Console()
    # Off a terminal rich would cut the table at 80 columns.
    console.width = console.width if console.is_terminal else 120
    console.print(table)
    typer.echo("difference: paired by seed, against the first method; error: aggregation error,")
    typer.echo("plain: that of the same uploads averaged factor by factor; angle: in degrees.")
    for sentence in findings(result):
        typer.echo(sentence)
    pictures = sorted(output.glob("*.png"))
    for picture in pictures:
        typer.echo(f"picture  {picture}")
    typer.echo(f"report   {output / 'report.html'}")
    if merge_command:
        typer.echo(f"next     {merge_command}")
