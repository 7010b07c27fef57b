"""`fedrot aggregate`: several adapters on disk become one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from fedrot.cli._run import user_errors
from fedrot.errors import FedrotError
from fedrot.progress import progress

if TYPE_CHECKING:
    from fedrot.adapters import Merged
    from fedrot.methods import FedRot, FlexLoRA, Robust


class Align(str, Enum):
    """What the rotation is fitted to."""

    joint = "joint"
    A = "A"
    B = "B"
    gpa = "gpa"
    optimal = "optimal"


class Rule(str, Enum):
    """How the aligned adapters become one."""

    mean = "mean"
    median = "median"
    trimmed = "trimmed"
    krum = "krum"
    multi_krum = "multi-krum"
    clip = "clip"
    exact = "exact"


class Rotation(str, Enum):
    """Which rotation is taken."""

    procrustes = "procrustes"
    shifted = "shifted"


# Options that `fedrot inspect` has, too.
Weights = Annotated[
    str | None, typer.Option(help="3,1 or a JSON file: a list, or an object by folder name.")
]
Lam = Annotated[
    str,
    typer.Option(
        help="0: plain average, 1: whole rotation; auto: least error, by layer; auto-client: by "
        "layer and client."
    ),
]
# The names of the choices would leave the help no room beside them: it says them itself.
Fitted = Annotated[
    Align,
    typer.Option(
        metavar="NAME",
        help="What the rotation is fitted to: joint, A or B of the reference; gpa: the mean of "
        "the aligned; optimal: the error itself.",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        help="For --rank auto: share of the squared singular values; .95 if not given.",
        show_default=False,
    ),
]


def read_rank(text: str | None) -> int | Literal["auto"] | None:
    """`--rank`: a whole number, or `auto`.

    Raises:
        FedrotError: it is neither.
    """
    if text is None or text == "auto":
        return cast('Literal["auto"] | None', text)
    try:
        return int(text)
    except ValueError as error:
        raise FedrotError(f"--rank must be a whole number or auto, got {text!r}") from error


def read_lam(text: str) -> float | str:
    """`--lam`: a number, `auto` or `auto-client`."""
    try:
        return float(text)
    except ValueError:
        return text  # the method says what is wrong with it


@user_errors
def aggregate(
    clients: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLIENT...", help="PEFT folders, or whole models.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="Adapter to align to; the first client if not given."),
    ] = None,
    weights: Weights = None,
    lam: Lam = "1.0",
    align: Fitted = Align.joint,
    proper: Annotated[
        bool | None,
        typer.Option(
            "--proper/--improper",
            help="Rotations only, or reflections too; proper for the mean alone if not given.",
            show_default=False,
        ),
    ] = None,
    rotation: Annotated[
        Rotation,
        typer.Option(
            metavar="NAME",
            help="procrustes: the best one, as far as --lam says; shifted: in the place of --lam, "
            "the less the weaker the evidence.",
        ),
    ] = Rotation.procrustes,
    eps: Annotated[
        float | None,
        typer.Option(
            help="For --rotation shifted: what evidence counts as weak; .03 if not given.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Rule | None,
        typer.Option(
            metavar="NAME",
            help="How they are combined: mean of the aligned ones; median, trimmed, krum, "
            "multi-krum, clip: what withstands bad ones; exact: the best approximation of the "
            "exact mean, nothing is rotated. Mean if not given, exact with --rank auto.",
            show_default=False,
        ),
    ] = None,
    attackers: Annotated[
        int | None,
        typer.Option(
            help="For --rule trimmed, krum, multi-krum: how many bad ones to withstand; 1 if not "
            "given.",
            show_default=False,
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            help="For --rule clip: the longest change of the reference; their median length if "
            "not given.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Pad the reference to this rank first; with --rule exact, rank of the result; "
            "auto: by layer the smallest that holds --energy of the exact mean.",
            show_default=False,
        ),
    ] = None,
    energy: Energy = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings only.")] = False,
) -> None:
    """Align adapters to a reference and average them into one PEFT folder."""
    from fedrot import adapters
    from fedrot.methods import FedRot, FlexLoRA, Robust
    from fedrot.methods.robust import ONE_VOTE, WITHSTANDS

    wanted = read_rank(rank)
    if wanted == "auto" and rule not in (None, Rule.exact):
        raise FedrotError(
            "--rank auto is a rank of the exact mean, which --rule exact alone gives, got --rule "
            f"{rule.value}"
        )
    rule = rule or (Rule.exact if wanted == "auto" else Rule.mean)
    if attackers is not None and rule.value not in WITHSTANDS:
        raise FedrotError(
            f"--attackers {attackers} is for --rule {', '.join(WITHSTANDS)}; "
            f"--rule {rule.value} has no such number"
        )
    if bound is not None and rule is not Rule.clip:
        raise FedrotError(f"--bound {bound:g} is for --rule clip, got --rule {rule.value}")
    if bound is not None and not bound > 0:  # 0 stands for the median in `Robust`
        raise FedrotError(f"--bound must be above 0, got {bound:g}")
    turn = read_lam(lam)
    _check_rotation(rotation, eps, turn, align, rule)
    method: FedRot | FlexLoRA | Robust
    if rule is Rule.exact:
        if turn != 1.0 or align is not Align.joint or proper is not None:
            raise FedrotError(
                "--lam, --align and --proper are of rotations; --rule exact has none"
                + (", and --rank auto goes with it" if wanted == "auto" else "")
            )
        method = FlexLoRA("reference")
    elif rule is Rule.mean:
        options: dict[str, Any] = {"align": align.value, "rotation": rotation.value}
        options |= {"proper": proper, "eps": eps}
        if rotation is Rotation.procrustes:
            options["lam"] = turn
        method = FedRot(**{key: value for key, value in options.items() if value is not None})
    else:
        method = Robust(rule.value, attackers, bound or 0.0, turn, align.value, bool(proper))
    adapters.check_distinct(clients)
    adapters.check_output(output, [*clients, *([reference] if reference else [])], force)
    parsed = adapters.parse_weights(weights, clients)
    with progress(quiet) as track:
        merged = adapters.aggregate(
            clients,
            reference,
            weights=parsed,
            method=method,
            rank=wanted,
            energy=energy,
            track=track,
        )
    merged.save(output, force=force)

    notes = [*merged.notes]
    if parsed and rule.value in ONE_VOTE and len({weight for weight in parsed if weight}) > 1:
        notes.append(f"--rule {rule.value} gives one vote to every adapter of a weight above 0")
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if not quiet:
        _report(merged, method, output, reference is None)


def _check_rotation(
    rotation: Rotation, eps: float | None, turn: float | str, align: Align, rule: Rule
) -> None:
    """Refuse what `--rotation shifted` has no use for, and `--eps` without it."""
    if rotation is not Rotation.shifted:
        if eps is not None:
            raise FedrotError(f"--eps is for --rotation shifted, got --eps {eps:g} without it")
        return
    if rule is not Rule.mean:
        raise FedrotError(f"--rotation shifted is for --rule mean, got --rule {rule.value}")
    if turn != 1.0:
        raise FedrotError(f"--rotation shifted has --eps in the place of --lam, got --lam {turn}")
    if align in (Align.gpa, Align.optimal):
        raise FedrotError(
            "--rotation shifted is fitted to the reference: --align must be joint, A or B, got "
            f"{align.value}"
        )


def _report(merged: Merged, method: FedRot | FlexLoRA | Robust, output: Path, first: bool) -> None:
    of = " (the first client; choose another with --reference)" if first else ""
    rows = [
        ("clients", str(len(merged.uploads.adapters))),
        ("reference", f"{merged.uploads.target.source}{of}"),
        *(_errors(merged, method) if merged.distances is None else _distances(merged)),
        ("written", str(output)),
    ]
    width = max(22, *(len(name) + 1 for name, _ in rows))
    for name, value in rows:
        typer.echo(f"{name:<{width}}{value}")
    if merged.distances is None:
        _warn_if_worse(merged, method)


def _errors(merged: Merged, method: FedRot | FlexLoRA | Robust) -> list[tuple[str, str]]:
    layers = merged.uploads.target.keys.layers.values()
    ranks = ", ".join(str(rank) for rank in sorted({layer.rank for layer in layers}))
    summary = merged.misalignment.summary()
    error = error_text(summary["error_aligned"], summary["relative_aligned"])
    energy = []
    if spectrum := merged.spectrum and merged.spectrum.summary():
        asked, kept = (f"{100 * spectrum[key]:.4g} %" for key in ("energy", "kept"))
        energy = [("energy kept", f"{kept}, at least {asked} in each layer")]
    return [
        ("layers", f"{len(layers)} of rank {ranks}"),
        *energy,
        ("mean rotation", f"{summary['mean_angle']:.1f} degrees from the reference"),
        ("error, plain average", error_text(summary["error_plain"], summary["relative_plain"])),
        (f"error, {method.name}", ", ".join(filter(None, (error, _how(method, summary))))),
        *_chosen(merged),
        *_bound(summary, method),
    ]


def _chosen(merged: Merged) -> list[tuple[str, str]]:
    lam = merged.misalignment.lam
    if lam is None:
        return []
    if len(lam) > 1:
        lam = lam[merged.uploads.weights > 0]  # of the others it means nothing
    clients, layers = lam.shape
    over = f"{layers} layer{'s' if layers > 1 else ''}"
    over += f" and {clients} clients" if clients > 1 else ""
    low, middle, high = (f"{float(lam.quantile(q)):.3g}" for q in (0.0, 0.5, 1.0))
    return [("lam, as chosen", f"median {middle}, {low} to {high} over {over}")]


def _bound(
    summary: dict[str, float | None], method: FedRot | FlexLoRA | Robust
) -> list[tuple[str, str]]:
    from fedrot.methods import FlexLoRA

    if isinstance(method, FlexLoRA) and _is_least(summary):
        return []
    least = error_text(summary["error_bound"], summary["relative_bound"])
    return [("error, least possible", f"{least}, of any adapter of this rank")]


def _is_least(summary: dict[str, float | None]) -> bool:
    """Whether the error is the bound but for rounding. It is not where float32 has no number for
    the squares of the factors, nor where the bound is less than the rounding of the result."""
    error, bound, norm = (summary[key] for key in ("error_aligned", "error_bound", "norm"))
    assert error is not None and bound is not None and norm is not None
    return error <= bound + 1e-3 * norm


def _distances(merged: Merged) -> list[tuple[str, str]]:
    kind, distances = merged.uploads.target.kind, merged.distances
    assert kind is not None and distances is not None
    return [
        ("adapters", kind.title),
        ("distance, as they are", f"{distances['distance_plain']:.4g} from the reference"),
        ("distance, aligned", f"{distances['distance_aligned']:.4g}"),
    ]


def _warn_if_worse(merged: Merged, method: FedRot | FlexLoRA | Robust) -> None:
    from fedrot.methods import FedRot
    from fedrot.metrics import total

    measured = merged.misalignment
    norm, plain, aligned = (total(e) for e in (measured.norm, measured.plain, measured.aligned))
    if isinstance(method, FedRot) and aligned > plain + 1e-4 * norm:  # more than rounding
        instead = " instead of --rotation shifted" if method.rotation == "shifted" else ""
        message = f"note: aligning increased the error on these adapters; --lam 0{instead}"
        typer.echo(f"{message} averages plainly", err=True)


def _how(method: FedRot | FlexLoRA | Robust, summary: dict[str, float | None]) -> str:
    from fedrot.methods import FedRot, FlexLoRA, Robust

    if isinstance(method, FlexLoRA):
        return "the least of any adapter of this rank" if _is_least(summary) else ""
    if isinstance(method, FedRot) and method.rotation == "shifted":
        return f"shifted, eps {method.eps:g}, align {method.align}"
    lam = method.lam if isinstance(method.lam, str) else f"{method.lam:g}"
    rule = f"{method.rule}, " if isinstance(method, Robust) else ""
    return f"{rule}lam {lam}, align {method.align}"


def error_text(error: float | None, relative: float | None) -> str:
    """`0.123 (4.5 %)`: an aggregation error, and its part of the norm of the mean update."""
    if relative is None:
        return f"{error:.4g}"
    share = 100 * relative
    return f"{error:.4g} ({share:.0f} %)" if share >= 100 else f"{error:.4g} ({share:.2g} %)"
