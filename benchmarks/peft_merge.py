"""``fedrot.aggregate`` beside PEFT's ``add_weighted_adapter``: ``python -m benchmarks.peft_merge``.

Time and error on one 2048 x 2048 layer, then accuracy on the digits task, of the same adapters
merged in every way. Writes ``benchmarks/results/peft/<machine>.json`` and prints the tables of
docs/peft.md. ``--quick`` is a tenth of it, without the slow forms, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

import fedrot
from fedrot.bench import machine
from fedrot.bench.tables import times as times_of
from fedrot.config import load
from fedrot.factors import Factors
from fedrot.files import write_json
from fedrot.gauge import regauge
from fedrot.methods import FedIT, FedRot, FlexLoRA, Method
from fedrot.options import parse_overrides
from fedrot.report import markdown
from fedrot.simulation.adapter import set_head
from fedrot.simulation.rounds import prepare, train_round

SIZE, RANK, CLIENTS, DENSITY = 2048, 16, 8, 0.5
MERGED, ALONE = "merged", "one client alone"


@dataclass(frozen=True)
class Form:
    """One way to merge; ``merge(model, names, density)`` leaves an adapter called MERGED."""

    name: str
    merge: Callable[[PeftModel, list[str], float], None]
    slow: bool = False
    timed: bool = True


def by_peft(
    kind: str,
    weight: Callable[[int, float], float],
    model: PeftModel,
    names: list[str],
    density: float,
    **options: Any,
) -> None:
    """``weight`` of number and density: with it, equal adapters give that adapter back."""
    weights = [weight(len(names), density)] * len(names)
    if kind.startswith(("ties", "dare", "magnitude")):
        options["density"] = density
    model.add_weighted_adapter(names, weights, MERGED, combination_type=kind, **options)


def by_fedrot(method: Method, model: PeftModel, names: list[str], density: float) -> None:
    sources = [(model, name) for name in names]
    fedrot.aggregate(sources, method=method).add_to(model, MERGED)


def mean(n: int, density: float) -> float:
    return 1 / n


def squared(n: int, density: float) -> float:
    """Forms that sum factors multiply each by the root of its weight."""
    return 1 / n**2


def one(n: int, density: float) -> float:
    """TIES takes a mean by itself."""
    return 1.0


def rescaled(n: int, density: float) -> float:
    """DARE divides by the density what it keeps, and TIES then averages over that alone."""
    return density**2


FORMS = [
    Form("linear", partial(by_peft, "linear", squared)),
    Form("magnitude_prune", partial(by_peft, "magnitude_prune", squared)),
    Form("ties", partial(by_peft, "ties", one)),
    Form("dare_linear", partial(by_peft, "dare_linear", squared)),
    Form("dare_ties", partial(by_peft, "dare_ties", rescaled)),
    Form("cat", partial(by_peft, "cat", mean)),
    Form("svd", partial(by_peft, "svd", mean), slow=True),
    Form("ties_svd", partial(by_peft, "ties_svd", one), slow=True, timed=False),
    Form("dare_linear_svd", partial(by_peft, "dare_linear_svd", mean), slow=True, timed=False),
    Form("fedrot: FedIT()", partial(by_fedrot, FedIT())),
    Form("fedrot: FedRot(1.0)", partial(by_fedrot, FedRot(1.0))),
    Form("fedrot: FedRot(1.0), improper", partial(by_fedrot, FedRot(1.0, proper=False))),
    Form("fedrot: FlexLoRA()", partial(by_fedrot, FlexLoRA())),
]


def layer(adapters: Sequence[Factors]) -> tuple[PeftModel, list[str]]:
    """A model of one linear layer with these adapters."""
    d, k = adapters[0].B["0"].shape[0], adapters[0].A["0"].shape[1]
    rank = adapters[0].A["0"].shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(k, d, bias=False)), config)
    return model, with_adapters(model, config, adapters)


def with_adapters(model: PeftModel, config: LoraConfig, adapters: Sequence[Factors]) -> list[str]:
    """Add adapters to a model; their names."""
    names = [f"client-{i}" for i in range(len(adapters))]
    for name, factors in zip(names, adapters, strict=True):
        model.add_adapter(name, copy.deepcopy(config))
        state = {}
        for module in factors.A:
            state[f"base_model.model.{module}.lora_A.weight"] = factors.A[module]
            state[f"base_model.model.{module}.lora_B.weight"] = factors.B[module]
        loaded: Any = set_peft_model_state_dict(model, state, adapter_name=name)
        assert not loaded.unexpected_keys
    return names


def cases(size: int, clients: int, seed: int = 0) -> dict[str, list[Factors]]:
    """Clients that hold one update, its directions falling from 1 to 0.1 in size, plus noise."""
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -1, RANK)

    def draw() -> tuple[Tensor, Tensor]:
        A, B = (torch.randn(RANK, size, generator=gen) for _ in range(2))
        return sizes[:, None] ** 0.5 * A, B.T * sizes**0.5

    def noisy(A: Tensor, B: Tensor, noise: float) -> Factors:
        A_noise, B_noise = draw()
        return Factors({"0": A + noise * A_noise}, {"0": B + noise * B_noise})

    A, B = draw()
    shared = [noisy(A, B, 0.1) for _ in range(clients)]
    return {
        "copies": [noisy(A, B, 0)] * clients,
        "one basis": shared,
        "bases of their own": [regauge(factors, gen) for factors in shared],
        "nothing in common": [noisy(A, B, 0) for A, B in (draw() for _ in range(clients))],
    }


def update(model: PeftModel, name: str) -> Tensor:
    """``scaling B A`` of the one layer, float64."""
    module: Any = model.base_model.model[0]
    A, B = module.lora_A[name].weight, module.lora_B[name].weight
    return module.scaling[name] * (B.double() @ A.double())


@torch.no_grad()
def error(form: Form, model: PeftModel, names: list[str], density: float = DENSITY) -> float:
    """``||mean_i dW_i - dW||_F / ||mean_i dW_i||_F``."""
    torch.manual_seed(0)  # DARE drops at random
    exact = sum(update(model, name) for name in names) / len(names)
    form.merge(model, names, density)
    found = update(model, MERGED)
    model.delete_adapter(MERGED)
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def times(forms: Sequence[Form], model: PeftModel, names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of each form, in turns, from adapters in the model to a new one in it."""
    samples: dict[str, list[float]] = {form.name: [] for form in forms}
    for form in forms:
        if not form.slow:  # once, so that none pays for what is set up on first use
            error(form, model, names)
    for _ in range(rounds):
        for form in forms:
            for _ in range(1 if form.slow else 5):
                begin = time.perf_counter()
                form.merge(model, names, DENSITY)
                samples[form.name].append(time.perf_counter() - begin)
                model.delete_adapter(MERGED)
    return {name: {"median": statistics.median(s), "calls": len(s)} for name, s in samples.items()}


STARTS = {"trained apart": "own", "trained from one start": "shared"}


def accuracies(forms: Sequence[Form], start: str, seed: int) -> dict[str, float]:
    """Test accuracy of the digits task: ten clients train once, then are merged in every way."""
    options = ["setting=one-shot", f"start={start}", f"seed={seed}"]
    config = load(parse_overrides(options))
    federation = prepare(config)
    uploads = train_round(federation, federation.start())
    model, head = federation.model, federation.start().head
    with torch.no_grad():
        names = with_adapters(model, model.peft_config["default"], uploads.factors)
        set_head(model, head)

        def score(name: str) -> float:
            model.set_adapter(name)
            return config.task.evaluate(model.eval(), federation.data.test)["accuracy"]

        found = {ALONE: statistics.fmean(score(name) for name in names)}
        for form in forms:
            torch.manual_seed(seed)
            form.merge(model, names, DENSITY)
            found[form.name] = score(MERGED)
            model.set_adapter(names[0])
            model.delete_adapter(MERGED)
    return found


def run(quick: bool, rounds: int, seeds: int) -> dict[str, Any]:
    forms = [form for form in FORMS if not (quick and form.slow)]
    size = SIZE // 8 if quick else SIZE
    result: dict[str, Any] = {
        "machine": machine.describe("cpu", torch.get_num_threads()),
        "size": size,
        **{"rank": RANK, "clients": CLIENTS, "density": DENSITY, "seeds": seeds},
        "errors": {},
        "accuracy": {},
    }
    model, names = layer(cases(SIZE // 16, CLIENTS)["copies"])
    for form in forms:  # does each do what it is said to, weights and all?
        if (found := error(form, model, names, density=1.0)) > 1e-4:
            raise RuntimeError(f"{form.name}: copies of one adapter differ by {found:.2g}")
    for name, adapters in cases(size, CLIENTS).items():
        if name == "copies":
            continue
        model, names = layer(adapters)
        result["errors"][name] = {form.name: error(form, model, names) for form in forms}
        print(name, result["errors"][name], flush=True)
        if name == "bases of their own":
            timed = [form for form in forms if form.timed]
            result["times"] = times(timed, model, names, rounds)
            print(result["times"], flush=True)
    for label, start in STARTS.items():
        per_seed = []
        for seed in range(seeds):
            per_seed.append(accuracies(forms, start, seed))
            print(label, seed, per_seed[-1], flush=True)
        result["accuracy"][label] = {key: [s[key] for s in per_seed] for key in per_seed[0]}
    return result


def tables(result: dict[str, Any]) -> str:
    """The two tables of docs/peft.md."""
    fedrot_time = result["times"]["fedrot: FedRot(1.0)"]["median"]
    errors = result["errors"]
    rows = []
    for name in errors["one basis"]:
        timing = result["times"].get(name)
        seconds = seconds_text(timing["median"]) if timing else ""
        ratio = times_of(timing["median"] / fedrot_time) if timing else ""
        rows.append(
            [f"`{name}`", seconds, ratio, *(f"{round(e[name], 6):.2g}" for e in errors.values())]
        )
    first = markdown.table(("form", "time", "of FedRot", *errors), rows)
    labels = list(result["accuracy"])
    rows = [
        [
            name if name == ALONE else f"`{name}`",
            *(mean_std(result["accuracy"][label][name]) for label in labels),
        ]
        for name in result["accuracy"][labels[0]]
    ]
    return first + "\n" + markdown.table(("form", *labels), rows)


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def mean_std(values: Sequence[float]) -> str:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {std:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.peft_merge")
    parser.add_argument("--quick", action="store_true", help="a tenth of it, writes nothing")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    # PEFT asks transformers 5.2 for an attribute that it has renamed.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    result = run(given.quick, given.rounds, 1 if given.quick else given.seeds)
    if not given.quick:
        folder = Path(__file__).parent / "results" / "peft"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{machine.kind(result['machine'])}.json", result)
    print(tables(result))


if __name__ == "__main__":
    main()
