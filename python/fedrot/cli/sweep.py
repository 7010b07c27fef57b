"""`fedrot sweep`: an experiment of many runs from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrot.cli._run import user_errors
from fedrot.progress import progress

if TYPE_CHECKING:
    from fedrot.sweep.analysis import Results


@user_errors
def sweep(
    experiment: Annotated[Path, typer.Argument(help="YAML file, as in experiments/.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="Instead of the file's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder; runs/NAME of the experiment if not given."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; all cores if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Remove earlier runs first.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Tune every method alike, run all over the seeds, and write tables, pictures and a page.

    Run again after an interruption: finished runs are kept.
    """
    _look_for_tasks(experiment)  # before torch is imported, which takes seconds

    from fedrot.bench.machine import cores
    from fedrot.sweep.analysis import Results
    from fedrot.sweep.experiment import read_experiment
    from fedrot.sweep.pages import write_results
    from fedrot.sweep.runner import run_experiment

    changes: dict[str, Any] = {} if seeds is None else {"seeds": seeds}
    planned = read_experiment(experiment, changes)
    folder = output or Path("runs") / planned.name
    folder.mkdir(parents=True, exist_ok=True)
    with progress(quiet) as track:
        outcomes = run_experiment(planned, folder, workers or cores(), track, force=force)
    results = Results(planned, outcomes)
    written = write_results(results, folder)
    if not quiet:
        _print(results)
        typer.echo(f"report   {written[-1]}")


def _look_for_tasks(experiment: Path) -> None:
    """Whether the models and data of all cells are within reach; what else is wrong with the file
    is found later."""
    from fedrot.hub import look_for
    from fedrot.options import merge, nested, read_yaml

    def task(options: Any) -> Any:
        listed = options.items() if isinstance(options, dict) else ()
        found = merge(*(nested(str(key), value) for key, value in listed)).get("task")
        named = isinstance(found, dict) and isinstance(found.get("name", ""), str)
        return found if named else None

    content = read_yaml(experiment)
    shared, vary = content.get("options"), content.get("vary")
    look_for(task(shared))
    for key, values in vary.items() if isinstance(vary, dict) else ():
        for value in values if isinstance(values, list) else ():
            own = task(value if isinstance(value, dict) else {key: value})
            if isinstance(own, dict):
                look_for(merge({"task": task(shared) or {}}, {"task": own})["task"])


def _print(results: Results) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from fedrot.sweep.pages import accuracies, failures

    console = Console(markup=False, emoji=False)  # brackets in a value are brackets
    # Off a terminal rich would cut the tables at 80 columns.
    console.width = console.width if console.is_terminal else 160
    for heading, header, rows in accuracies(results):
        table = Table(box=SIMPLE_HEAD, title=f"{results.experiment.title}: {heading}")
        for index, column in enumerate(header):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in failures(results):
        typer.echo(sentence)
