"""One merge of trained adapters of every kind: `python -m benchmarks.kinds [SEEDS]`.

Clients of a Dirichlet split train apart, from a start of their own or from one that they share, and
are merged once: plainly (`lam` 0) and aligned (`lam` 1), and beside that as whole weights, where a
kind can be put into the weights, and by averaging what the clients' models say (an ensemble, which
is no model). What changes weights learns `digits`, virtual tokens `strings`. Values of every seed
go to docs/findings/kinds.json.

`python -m benchmarks.kinds --rates` gives the accuracy of a single client at every learning rate,
on a seed that is not measured; the `rate` of each `Case` is the best.
"""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import peft
import torch
import typer
from torch import Tensor, nn

import fedrot
from fedrot.files import write_json
from fedrot.methods import FedIT, FedRot
from fedrot.progress import no_progress, progress
from fedrot.statistics import paired
from fedrot.tasks.base import Batch, TaskData, example_losses
from fedrot.tasks.digits import Digits
from fedrot.tasks.partition import dirichlet
from fedrot.tasks.strings import Strings

OUT = Path(__file__).parents[1] / "docs" / "findings" / "kinds.json"
SEEDS, RATES_SEED = 10, 1000
CLIENTS, ALPHA, STEPS, BATCH = 5, 0.5, 100, 32
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TASKS = {"digits": Digits(), "strings": Strings(train_examples=1500)}

# As transformers 5 names the layers of a ViT.
LOW_RANK: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
TOKENS: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8}
ALIKE = ("shared",)  # the start is not random


@dataclass(frozen=True)
class Case:
    """An adapter; no configuration: all weights but the head, which is frozen for every kind."""

    kind: str
    config: peft.PeftConfig | None
    rate: float  # of Adam
    starts: tuple[str, ...] = ("own", "shared")  # first: shared, but the first client is reference
    task: str = "digits"


CASES = [
    Case("LoRA", peft.LoraConfig(**LOW_RANK, lora_alpha=8), 0.01),
    Case("DoRA", peft.LoraConfig(**LOW_RANK, lora_alpha=8, use_dora=True), 0.03),
    Case("LoHa", peft.LoHaConfig(**LOW_RANK, alpha=8), 0.03),
    Case(
        "VeRA",
        peft.VeraConfig(r=32, target_modules=LOW_RANK["target_modules"]),
        0.1,
        ("shared", "first"),
    ),
    Case(
        "(IA)3",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
        0.3,
        ALIKE,
    ),
    Case("whole parameters", None, 0.003, ALIKE),
    Case("prompt tuning", peft.PromptTuningConfig(**TOKENS), 0.3, task="strings"),
    Case("prefix tuning", peft.PrefixTuningConfig(**TOKENS), 0.1, task="strings"),
]


class Says(nn.Module):
    """Models as one, by the mean of their probabilities; without places of virtual tokens."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **inputs: Tensor) -> Any:
        logits = [model(**inputs).logits for model in self.models]
        if "input_ids" in inputs:
            logits = [part[:, -inputs["input_ids"].shape[1] :] for part in logits]
        if len(logits) > 1:
            logits = [torch.stack([part.softmax(-1) for part in logits]).mean(0).log()]
        return SimpleNamespace(logits=logits[0])


@cache
def prepared(task: str, seed: int) -> TaskData:
    return TASKS[task].prepare(seed, no_progress)


def fresh(case: Case, data: TaskData, seed: int) -> nn.Module:
    """The base model with a new adapter, drawn from ``seed``."""
    model = TASKS[case.task].load_model(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if case.config is not None:
            return peft.get_peft_model(model, deepcopy(case.config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("classifier"))
    return model


def train(model: nn.Module, batch: Batch, rate: float, seed: int) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    model.train()  # no model here has dropout
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    says, count = Says(model), len(batch["labels"])
    for _ in range(STEPS):
        rows = torch.randint(count, (BATCH,), generator=draw)
        part = {key: value[rows] for key, value in batch.items()}
        sums, terms = example_losses(says(**{k: v for k, v in part.items() if k != "labels"}), part)
        optimizer.zero_grad()
        (sums.sum() / terms.sum()).backward()
        optimizer.step()
    return model.eval()


def clients(case: Case, start: str, seed: int) -> tuple[TaskData, nn.Module, list[nn.Module]]:
    """The data, where all began (the first client's start, of several) and the trained clients."""
    data = prepared(case.task, seed)
    seeds = [1000 * seed + (client if start == "own" else 0) for client in range(CLIENTS)]
    trained = []
    for client, rows in enumerate(dirichlet(data.labels, CLIENTS, ALPHA, seed)):
        batch = {key: value[rows] for key, value in data.train.items()}
        trained.append(train(fresh(case, data, seeds[client]), batch, case.rate, seed + client))
    return data, fresh(case, data, seeds[0]), trained


def source(model: nn.Module) -> Any:
    """A client as `fedrot.aggregate` takes it."""
    return model if isinstance(model, peft.PeftModel) else (model.state_dict(), None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the base model with the adapter in them."""
    if isinstance(model, peft.PeftModel):
        model = deepcopy(model).merge_and_unload()
    return model.state_dict()


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((ours[k] - v).double().square().sum()) for k, v in theirs.items()))


def measure(case: Case, start: str, seed: int) -> dict[str, float]:
    """Accuracies, the distances that the merge reports, and errors of the merged weights."""
    data, begun, trained = clients(case, start, seed)
    sources = [source(model) for model in trained]

    def accuracy(*models: nn.Module) -> float:
        return TASKS[case.task].evaluate(Says(*models), data.test)["accuracy"]

    found = {
        "start": accuracy(begun),
        "single": statistics.mean(accuracy(model) for model in trained),
        "ensemble": accuracy(*trained),
    }
    # Without a start in common, or without its being known, the first client is the reference.
    reference = source(deepcopy(begun)) if start == "shared" else None
    models = {}
    for name, method in (("plain", FedIT()), ("aligned", FedRot(lam=1.0))):
        merged = fedrot.aggregate(sources, reference, method=method)
        models[name] = deepcopy(begun)
        if case.config is None:
            models[name].load_state_dict(merged.tensors)
        else:
            peft.set_peft_model_state_dict(models[name], merged.tensors)
        found[name] = accuracy(models[name])
    if merged.distances is None:
        reported = merged.misalignment.summary()
        found["reported"] = reported["error_aligned"] / reported["error_plain"]
    else:
        distances = merged.distances
        found["reported"] = distances["distance_aligned"] / distances["distance_plain"]
    if case.task == "digits":
        apart = [weights(model) for model in trained]
        mean = fedrot.aggregate([(each, None) for each in apart]).tensors
        exact = TASKS[case.task].load_model(data)
        exact.load_state_dict(mean)
        found["exact"] = accuracy(exact)
        # Of what the clients have learnt in the mean.
        learnt = gap(mean, weights(begun))
        for name, model in models.items():
            found[f"error_{name}"] = gap(weights(model), mean) / learnt
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def difference(rows: list[dict[str, float]], ours: str, theirs: str) -> str:
    """The mean difference with its 95 % t-interval."""
    found = paired([row[ours] - row[theirs] for row in rows])
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if found else ""


def show(results: list[dict[str, Any]]) -> None:
    columns = ("start", "single", "plain", "aligned", "exact", "ensemble")
    pairs = (("aligned", "plain"), ("aligned", "single"), ("exact", "aligned"))
    ratios = ("reported", "error_plain", "error_aligned")
    names = [*columns, *(f"{a} - {b}" for a, b in pairs), *ratios]
    print(f"| kind | from | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}")
    for result in results:
        rows = result["seeds"]
        cells = [spread([r[c] for r in rows]) if c in rows[0] else "" for c in columns]
        cells += [difference(rows, a, b) if {a, b} <= rows[0].keys() else "" for a, b in pairs]
        cells += [spread([r[c] for r in rows]) if c in rows[0] else "" for c in ratios]
        print(f"| {result['kind']} | {result['start']} | {' | '.join(cells)} |")


def rates() -> None:
    """Accuracy of the mean single client by learning rate."""
    print(f"| kind | {' | '.join(f'{rate:g}' for rate in RATES)} |\n|---|{'---:|' * len(RATES)}")
    for case in CASES:
        cells = []
        for rate in RATES:
            data, _, trained = clients(replace(case, rate=rate), case.starts[0], RATES_SEED)
            scores = [TASKS[case.task].evaluate(Says(m), data.test)["accuracy"] for m in trained]
            cells.append(f"{statistics.mean(scores):.3f}")
        print(f"| {case.kind} | {' | '.join(cells)} |", flush=True)


def main(
    seeds: Annotated[int, typer.Argument(min=2)] = SEEDS,
    by_rate: Annotated[
        bool, typer.Option("--rates", help="Accuracy of a single client by learning rate instead.")
    ] = False,
) -> None:
    """Merge, print the table and write it to docs/findings/."""
    torch.set_num_threads(1)
    if by_rate:
        rates()
        return
    jobs = [(case, start, seed) for case in CASES for start in case.starts for seed in range(seeds)]
    pool = ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool, progress() as track:
        running = [pool.submit(measure, *job) for job in jobs]
        found = [future.result() for future in track(running, "adapters")]
    results = [
        {"kind": case.kind, "start": start, "seeds": found[at : at + seeds]}
        for at, (case, start, seed) in enumerate(jobs)
        if seed == 0
    ]
    about = {
        "clients": CLIENTS,
        "alpha": ALPHA,
        "steps": STEPS,
        "batch": BATCH,
        "optimizer": "adam",
    }
    used = {case.kind: case.rate for case in CASES}
    write_json(OUT, {**about, "rates": used, "results": results})
    show(results)


if __name__ == "__main__":
    typer.run(main)
