"""`fedrot bench`: the operators against plain PyTorch and against the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrot.cli._run import listed, user_errors
from fedrot.progress import progress


@user_errors
def bench(
    short: Annotated[bool, typer.Option("--short", help="A selection, within a minute.")] = False,
    cases: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated parts of names, as in roberta,r64: these only.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Comma-separated; float32,bfloat16 (--short: float32).")
    ] = None,
    align: Annotated[
        str | None, typer.Option(help="Comma-separated: A, B, joint; A,joint (--short: A).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; all cores if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for JSON and PNG.")] = Path(
        "runs/bench"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Time the operators against plain PyTorch, and against what the machine allows."""
    from fedrot.bench import run, tables

    plan = run.plan(
        short=short,
        cases=_listed(cases),
        dtypes=_listed(dtype),
        aligns=_listed(align),
        threads=threads,
        device=device,
    )
    with progress(quiet) as track:
        result = run.measure(plan, track)
    written = run.write(result, output)
    if not quiet:
        tables.show(result)
        for path in written:
            typer.echo(f"written  {path}")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else listed(text)
