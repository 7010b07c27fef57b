"""`fedrot inspect`: the layers of adapters, and how far apart they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrot.cli._run import user_errors
from fedrot.cli.aggregate import (
    Align,
    Energy,
    Fitted,
    Lam,
    Weights,
    error_text,
    read_lam,
    read_rank,
)
from fedrot.errors import FedrotError
from fedrot.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from fedrot.adapters import Adapter, Misalignment, Spectrum, Uploads
    from fedrot.adapters.kinds import Distances
    from fedrot.methods import FedRot

BARS = 16  # singular values in the terminal


@user_errors
def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="PEFT folders, or models'.", show_default=False),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="Adapter to compare with; the first of several if not given."),
    ] = None,
    weights: Weights = None,
    lam: Lam = "1.0",
    align: Fitted = Align.joint,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Pad the reference to this rank first; auto: show the singular values of the "
            "exact mean, and the ranks that hold --energy of it.",
            show_default=False,
        ),
    ] = None,
    energy: Energy = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="For --rank auto: a PNG to draw them into.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show layers, shapes, ranks and scalings; of several adapters also the misalignment.

    Of another kind than LoRA: tensors and shapes; of several how far apart they are.
    """
    from fedrot import adapters
    from fedrot.methods import FedRot

    wanted = read_rank(rank)
    for name, value in (("--energy", energy), ("--plot", plot)):
        if value is not None and wanted != "auto":
            raise FedrotError(f"{name} is for --rank auto, got {name} {value} without it")
    method = FedRot(read_lam(lam), align.value)
    adapters.check_distinct(folders)
    parsed = adapters.parse_weights(weights, folders)
    with progress() as track:
        read = [adapters.read(path, str(path)) for path in track(folders, "reading")]
    ref = adapters.read(reference, str(reference)) if reference else read[0]
    several = reference is not None or len(read) > 1
    if isinstance(wanted, int) and not several:
        raise FedrotError(f"--rank {wanted} pads a reference: there must be one, or two adapters")
    if not several:
        alone = {
            "--lam": read_lam(lam) != 1.0,
            "--align": align is not Align.joint,
            "--weights": weights,
        }
        for name, given in alone.items():
            if given:
                raise FedrotError(f"{name} needs several adapters, or one and a reference")
    if ref.kind is not None:
        ref.kind.check_rank(rank=wanted, energy=energy)
        compared = adapters.gather(read, ref, parsed) if several else None
        _inspect_tensors(read, compared, method, as_json)
        return
    uploads = measured = spectrum = None
    if several or wanted == "auto":
        # A spectrum has no need of one rank, nor of one that is large enough.
        uploads = adapters.gather(read, ref, parsed, {} if wanted == "auto" else wanted)
    if uploads and several:
        measured = adapters.measure(uploads, method)
    if uploads and wanted == "auto":
        spectrum = adapters.measure_spectrum(uploads, energy)
    if spectrum and plot:
        from fedrot.files import write_bytes
        from fedrot.report.plots import spectrum as drawn

        values = {name: v.tolist() for name, v in spectrum.values.items()}
        write_bytes(plot, drawn(values, spectrum.ranks, spectrum.energy))
    if as_json:
        typer.echo(json.dumps(_as_json(read, uploads, measured, spectrum), indent=2))
    else:
        _show(read, uploads, measured, spectrum)


def _layer_rows(adapter: Adapter) -> list[dict[str, Any]]:
    rows = []
    for layer in adapter.keys.layers.values():
        A, B = adapter.tensors[layer.key_A], adapter.tensors[layer.key_B]
        rows.append(
            {
                "layer": layer.name,
                "A": list(A.shape),
                "B": list(B.shape),
                "rank": layer.rank,
                "experts": layer.experts,
                "scaling": layer.scaling,
                "dtype": _dtype(A),
            }
        )
    return rows


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _as_json(
    read: list[Adapter],
    uploads: Uploads | None,
    measured: Misalignment | None,
    spectrum: Spectrum | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "adapters": [{"path": a.source, "kind": _kind(a), "layers": _layer_rows(a)} for a in read]
    }
    if uploads is not None and measured is not None:
        names = list(uploads.target.keys.layers)
        result["reference"] = uploads.target.source
        result["notes"] = uploads.notes
        result["summary"] = measured.summary()
        result["angles"] = {
            adapter.source: dict(zip(names, row, strict=True))
            for adapter, row in zip(uploads.adapters, measured.angles.tolist(), strict=True)
        }
        result["errors"] = measured.by_layer()
    if spectrum is not None:
        result["spectrum"] = {
            "energy": spectrum.energy,
            "kept": spectrum.kept(spectrum.ranks),
            "layers": {
                name: {
                    "rank": rank,
                    "kept": spectrum.kept({name: rank}),
                    "singular_values": spectrum.values[name].tolist(),
                }
                for name, rank in spectrum.ranks.items()
            },
        }
    return result


def _inspect_tensors(
    read: list[Adapter], uploads: Uploads | None, method: FedRot, as_json: bool
) -> None:
    """Of another kind than LoRA: what is averaged, and the distances from the reference."""
    from rich.console import Console

    from fedrot.adapters import kinds

    distances, norm = None, 0.0
    if uploads:
        with progress() as track:
            uploads, distances = kinds.align(uploads, method, track)
        norm = kinds.length(uploads.target)
        uploads.check_unchanged()
    if as_json:
        typer.echo(json.dumps(_tensors_as_json(read, uploads, distances, norm), indent=2))
        return
    console = Console()
    for rows, same in _layouts(read, _tensor_rows):
        table = _table(f"{_sources(same)}: {_kind(same[0])}", "tensor", "shape", "dtype")
        for row in rows:
            name = row["tensor"].removeprefix("base_model.model.")
            table.add_row(name, "x".join(map(str, row["shape"])) or "scalar", row["dtype"])
        console.print(table)
    for note in uploads.notes if uploads else ():
        typer.echo(f"note: {note}", err=True)
    if uploads and distances:
        console.print(_distance_table(uploads, distances, norm))


def _kind(adapter: Adapter) -> str:
    return adapter.kind.title if adapter.kind else "LoRA"


def _tensor_rows(adapter: Adapter) -> list[dict[str, Any]]:
    averaged = {key: adapter.tensors[key] for key in adapter.keys.plain}
    return [
        {"tensor": key, "shape": list(t.shape), "dtype": _dtype(t)} for key, t in averaged.items()
    ]


def _tensors_as_json(
    read: list[Adapter], uploads: Uploads | None, distances: Distances | None, norm: float
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "adapters": [{"path": a.source, "kind": _kind(a), "tensors": _tensor_rows(a)} for a in read]
    }
    if uploads and distances:
        result["reference"] = uploads.target.source
        result["notes"] = uploads.notes
        result["summary"] = {"norm": norm, **distances.summary(uploads.weights)}
        result["distances"] = {
            adapter.source: {"plain": plain, "aligned": aligned}
            for adapter, plain, aligned in zip(
                uploads.adapters, distances.plain, distances.aligned, strict=True
            )
        }
    return result


def _distance_table(uploads: Uploads, distances: Distances, norm: float) -> Any:
    title = f"distance from {uploads.target.source} (relative to its length)"
    table = _table(title, "adapter", "weight", "plain", "aligned")

    def texts(*values: float) -> list[str]:
        return [error_text(v, v / norm if norm else None) for v in values]

    weights = uploads.weights.tolist()
    for adapter, weight, *row in zip(
        uploads.adapters, weights, distances.plain, distances.aligned, strict=True
    ):
        table.add_row(adapter.source, f"{weight:.3f}", *texts(*row))
    table.add_section()
    table.add_row("all", "", *texts(*distances.summary(uploads.weights).values()))
    return table


def _show(
    read: list[Adapter],
    uploads: Uploads | None,
    measured: Misalignment | None,
    spectrum: Spectrum | None,
) -> None:
    """One table of layers for each different layout, then the misalignment and the spectrum."""
    from rich.console import Console

    console = Console()
    for rows, same in _layouts(read, _layer_rows):
        console.print(_layout_table(rows, same))
    for note in uploads.notes if uploads else ():
        typer.echo(f"note: {note}", err=True)
    if uploads and measured:
        console.print(_client_table(uploads, measured))
        console.print(_error_table(measured))
    if spectrum:
        console.print(_spectrum_table(spectrum, console.width))


def _layouts(
    read: list[Adapter], rows_of: Callable[[Adapter], list[dict[str, Any]]]
) -> list[tuple[list[dict[str, Any]], list[Adapter]]]:
    """The rows of each different layout, and the adapters that have it."""
    layouts: list[tuple[list[dict[str, Any]], list[Adapter]]] = []
    for adapter in read:
        rows = rows_of(adapter)
        for known, same in layouts:
            if known == rows:
                same.append(adapter)
                break
        else:
            layouts.append((rows, [adapter]))
    return layouts


def _sources(adapters: list[Adapter]) -> str:
    return ", ".join(adapter.source for adapter in adapters)


def _layout_table(rows: list[dict[str, Any]], same: list[Adapter]) -> Any:
    several = any(row["experts"] > 1 for row in rows)
    experts = ("experts",) if several else ()
    table = _table(_sources(same), "layer", "A", "B", "rank", *experts, "scaling", "dtype")
    for row in rows:
        shapes = ["x".join(str(n) for n in row[side]) for side in "AB"]
        counts = [str(row[name]) for name in ("rank", *experts)]
        table.add_row(row["layer"], *shapes, *counts, f"{row['scaling']:.6g}", row["dtype"])
    return table


def _client_table(uploads: Uploads, measured: Misalignment) -> Any:
    table = _table(
        f"rotation from {uploads.target.source} (degrees)", "adapter", "weight", "mean", "largest"
    )
    for adapter, weight, angles in zip(
        uploads.adapters, uploads.weights.tolist(), measured.angles, strict=True
    ):
        table.add_row(
            adapter.source, f"{weight:.3f}", f"{angles.mean():.1f}", f"{angles.max():.1f}"
        )
    return table


def _error_table(measured: Misalignment) -> Any:
    title = "aggregation error (relative to the mean update)"
    kinds = ("plain", "aligned")  # beside names of layers there is no room for more
    table = _table(title, "layer", "angle", *kinds)
    mean_angles = measured.angles.mean(0).tolist()
    for (name, layer), angle in zip(measured.by_layer().items(), mean_angles, strict=True):
        norm = layer["norm"]
        errors = (error_text(layer[kind], layer[kind] / norm if norm else None) for kind in kinds)
        table.add_row(name, f"{angle:.1f}", *errors)
    total = measured.summary()
    table.add_section()
    errors = (error_text(total[f"error_{kind}"], total[f"relative_{kind}"]) for kind in kinds)
    table.add_row("all", f"{total['mean_angle']:.1f}", *errors)
    return table


def _spectrum_table(spectrum: Spectrum, width: int) -> Any:
    """The rank of each layer, what it and the powers of two up to the largest keep, and the first
    singular values as bars beside the largest; of powers and bars as many as fit beside names."""
    largest, powers = max(spectrum.ranks.values()), [1]
    while powers[-1] < largest:
        powers.append(2 * powers[-1])
    longest = min(BARS, max(len(values) for values in spectrum.values.values()))
    # With their margins: names 4, ranks 7, shares 10 each (the first is that of the rank), bars 3.
    room = width - max(map(len, spectrum.ranks)) - 4 - 7 - 10 - 3
    bars_shown = min(longest, max(room - 10 * len(powers), BARS // 2))
    powers = powers[: max((room - bars_shown) // 10, 1)]
    title = f"spectrum of the exact mean; to keep: {100 * spectrum.energy:.4g} %"
    table = _table(title, "layer", "rank", "kept", *(f"at {n}" for n in powers), "values")

    def shares(ranks: dict[str, int]) -> list[str]:
        cuts = [ranks, *(dict.fromkeys(ranks, power) for power in powers)]
        # Rounded down, so that 100 % is all.
        return [f"{math.floor(1000 * spectrum.kept(cut)) / 10:.1f} %" for cut in cuts]

    for name, rank in spectrum.ranks.items():
        values = spectrum.values[name].tolist()[:bars_shown]
        bars = "".join("▁▂▃▄▅▆▇█"[math.ceil(8 * v / values[0]) - 1] for v in values)
        table.add_row(name, str(rank), *shares({name: rank}), bars)
    table.columns[-1].justify = "left"
    table.add_section()
    table.add_row("all", "", *shares(spectrum.ranks), "")
    return table


def _table(title: str, first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
