"""`fedrot train`: one federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrot.cli._run import listed, user_errors
from fedrot.progress import progress

if TYPE_CHECKING:
    from fedrot.options import Tree


@user_errors
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Options, as in local.lr=0.1.", show_default=False
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="fedrot (default), fedit, flexlora, ...: docs/methods.md.")
    ] = None,
    setting: Annotated[
        str | None, typer.Option(help="rounds (default), regauge or one-shot.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="digits (default), strings, text, sst2, ...")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="0 by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; METHOD-SETTING-SEED if not given.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs.")] = Path(
        "runs"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run.")] = False,
    log: Annotated[
        str, typer.Option(help="tensorboard, wandb, or both: they get the metrics too.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Train a federation and write runs/NAME with metrics, adapter, pictures and report."""
    from fedrot.hub import look_for
    from fedrot.options import merge, name_of, nested, parse_overrides, read_yaml

    flags = {"method.name": method, "setting": setting, "task.name": task, "seed": seed}
    given = merge(
        read_yaml(config) if config else {},
        *(nested(key, value) for key, value in flags.items() if value is not None),
        parse_overrides(overrides or []),
    )
    look_for(given.get("task"))  # before torch is imported, which takes seconds

    from fedrot.config import load
    from fedrot.errors import FedrotError
    from fedrot.methods import METHODS
    from fedrot.simulation.rounds import federate

    resolved = load(given)
    if name is not None and Path(name).name != name:
        raise FedrotError(f"--name must be the name of a folder under --output, got {name!r}")
    label = name_of(resolved.method, METHODS)
    run = output / (name or f"{label}-{resolved.setting}-{resolved.seed}")
    with progress(quiet) as track:
        summary = federate(resolved, run, resume=resume, force=force, log=listed(log), track=track)
    if not quiet:
        _print_result(run, resolved.tree(), summary)


def _print_result(run: Path, config: Tree, summary: dict[str, Any]) -> None:
    synthetic = " (synthetic)" if summary["synthetic"] else ""
    typer.echo(
        f"{summary['method']}, {config['setting']}{synthetic}, seed {config['seed']}: accuracy "
        f"{summary['accuracy']:.3f} (before {summary['start']['accuracy']:.3f}), "
        f"{summary['seconds_local'] + summary['seconds_aggregation']:.1f} s"
    )
    if "client_accuracy" in summary:
        typer.echo(f"one client alone, mean: {summary['client_accuracy']:.3f}")
    if "accuracy_averaged" in summary:
        typer.echo(
            "accuracy: mean over the clients' own models; "
            f"of the averaged adapter {summary['accuracy_averaged']:.3f}"
        )
    if "accuracy_local" in summary:
        typer.echo(
            "on test examples with each client's own mix of labels, mean: "
            f"{summary['accuracy_local']:.3f}"
        )
    if ranks := summary.get("ranks"):
        low, high = min(ranks.values()), max(ranks.values())
        typer.echo(
            f"ranks by layer: {low} to {high} after the last round, of at most "
            f"{config['lora']['r']}; mean over the rounds {summary['rank']:.1f}, which kept "
            f"{100 * summary['energy']:.4g} % of the energy"
        )
    typer.echo(f"adapter  {run / 'adapter'}")
    if (merged := run / "merged.safetensors").is_file():
        typer.echo(f"merged   {merged}, to be added to the frozen weights")
    typer.echo(f"report   {run / 'report.html'}")
