"""Federate the digits task through NVFLARE's simulator: `python job.py [KEY=VALUE ...]`.

The options are those of `fedrot train` under `HERE`; so are the data, the batches and the result.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe import SimEnv
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedrot.config import Config, load
from fedrot.methods import FedRot
from fedrot.nvflare import FedRotAggregator
from fedrot.options import first_difference, flatten, parse_overrides
from fedrot.simulation.adapter import set_factors
from fedrot.simulation.rounds import Federation, prepare

DEFAULTS = ["clients.count=3", "rounds=4"]
OUT = Path("runs/nvflare").resolve()

# Sections and options that this job knows; all others must keep their defaults.
HERE = {"setting", "seed", "rounds", "regauge", "validation", "threads", "task", "lora", "local"}
HERE |= {f"clients.{key}" for key in ("count", "partition", "alpha", "labels", "column", "weights")}
HERE |= {f"method.{key}" for key in ("lam", "align", "proper")}


def make_aggregator(config: Config) -> FedRotAggregator:
    method = config.method
    assert isinstance(method, FedRot)
    return FedRotAggregator(lam=method.lam, align=method.align, proper=method.proper)


def make_job(
    config: Config, overrides: list[str], start: Path, aggregator: FedRotAggregator
) -> FedJob:
    """FedAvg as NVFLARE has it, but for the aggregator."""
    clients = config.clients.count
    job = FedJob("digits", min_clients=clients)
    # Installed on every site; else NVFLARE copies the source, and what that imports, into the job.
    job.set_app_packages(["fedrot"])
    # The global model is the adapter alone. Without `allow_numpy_conversion` it stays in torch.
    persistor = PTFileModelPersistor(
        source_ckpt_file_full_name=str(start), allow_numpy_conversion=False
    )
    job.to_server(persistor, id="persistor")
    job.to_server(FedAvg(num_clients=clients, num_rounds=config.rounds, aggregator=aggregator))
    script = ScriptRunner(
        script=str(Path(__file__).with_name("client.py")),
        script_args=shlex.join(overrides),
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    job.to_clients(script)
    return job


def others(config: Config) -> dict[str, object]:
    """What must have its default."""
    flat = flatten(config.tree())
    return {
        key: value
        for key, value in flat.items()
        if key == "local.head" or not {key, key.split(".")[0]} & HERE
    }


def accuracy(federation: Federation) -> float:
    return federation.config.task.evaluate(federation.model, federation.data.test)["accuracy"]


def main(given: list[str]) -> None:
    overrides = [*DEFAULTS, *given]
    try:
        config = load(parse_overrides(overrides))
        if left_out := first_difference(others(load({})), others(config)):
            key, default, value = left_out
            raise ValueError(f"this example has {key}={default} only, got {value}")
        aggregator = make_aggregator(config)
    except ValueError as error:
        sys.exit(str(error))
    federation = prepare(config)
    model = set_factors(federation.model, federation.start().factors)
    before = accuracy(federation)

    OUT.mkdir(parents=True, exist_ok=True)
    start = OUT / "start.pt"
    torch.save(get_peft_model_state_dict(model), start)
    job = make_job(config, overrides, start, aggregator)
    SimEnv(num_clients=config.clients.count, workspace_root=str(OUT)).deploy(job)

    saved = OUT / "digits/server/simulate_job/app_server/FL_global_model.pt"
    set_peft_model_state_dict(model, torch.load(saved, weights_only=True)["model"])
    model.save_pretrained(OUT / "adapter")
    print(f"accuracy {accuracy(federation):.3f} (before {before:.3f})")
    print(f"adapter  {OUT / 'adapter'}")


if __name__ == "__main__":
    main(sys.argv[1:])
