"""The progress of long loops, as bars on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

# Wraps the iterations of a long loop to show them: `for x in track(range(n), "label")`.
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A :data:`Track` that shows nothing."""
    return items


@contextmanager
def progress(quiet: bool = False) -> Iterator[Track]:
    """A function that shows the loops it is given as bars, on stderr; nothing off a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    disabled = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disabled) as bars:

        def track(items: Iterable[Any], label: str) -> Iterator[Any]:
            items = items if isinstance(items, Sized) else list(items)
            bar = bars.add_task(label, total=len(items))
            try:
                for item in items:
                    yield item
                    bars.advance(bar)
            finally:
                bars.remove_task(bar)

        yield track
