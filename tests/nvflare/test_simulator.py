"""NVFLARE's simulator: a server and two clients, each a process of its own, on the loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "nvflare.apis", reason="NVFLARE is not installed: pip install 'fedrot[nvflare]'"
)

pytestmark = pytest.mark.integration

SECONDS = 400  # a few processes that import torch each; about 40 on two idle cores

# One client doubles both factors, the other makes them four times as large in a basis turned by 90
# degrees. With steps 3 and 1 the aligned average is (3 * 2 + 4) / 4 = 2.5 times the global model.
CLIENT = """
import sys
import nvflare.client as flare
import torch

turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
flare.init()
while flare.is_running():
    received = flare.receive()
    A, B = received.params["q.lora_A.weight"], received.params["q.lora_B.weight"]
    if flare.get_site_name() == "site-1":
        A, B, steps = 2 * A, 2 * B, 3
    else:
        A, B, steps = 4 * turn.T @ A, 4 * B @ turn, 1
        if received.current_round == int(sys.argv[1]):
            A = A / 0
    params = {"q.lora_A.weight": A, "q.lora_B.weight": B}
    flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": steps}))
"""

JOB = """
import json
import sys

from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

from fedrot.nvflare import FedRotAggregator

options = json.loads(sys.argv[1])
job = FedJob("job", min_clients=2)
job.set_app_packages(["fedrot"])
persistor = PTFileModelPersistor(
    source_ckpt_file_full_name=options["start"],
    allow_numpy_conversion=options["format"] == "numpy",
)
job.to_server(persistor, id="persistor")
job.to_server(FedAvg(num_clients=2, num_rounds=2, aggregator=FedRotAggregator(lam=1.0)))
runner = ScriptRunner(
    "client.py", options["bad_round"], server_expected_format=options["format"]
)
job.to_clients(runner)
sys.exit(job.simulator_run(options["workspace"], n_clients=2, threads=2))
"""


def simulate(folder: Path, **options: str) -> tuple[dict[str, torch.Tensor], str]:
    """The global model that the server has saved, and the server's log."""
    start = folder / "start.pt"
    torch.save({"q.lora_A.weight": torch.eye(2), "q.lora_B.weight": torch.eye(2)}, start)
    (folder / "client.py").write_text(CLIENT)
    (folder / "job.py").write_text(JOB)
    workspace = folder / "workspace"
    arguments = json.dumps({"start": str(start), "workspace": str(workspace), **options})
    with subprocess.Popen(
        [sys.executable, "job.py", arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            output, _ = job.communicate(timeout=SECONDS)
        finally:
            _end(job)
    server = workspace / "server"
    saved = server / "simulate_job/app_server/FL_global_model.pt"
    assert saved.is_file(), output
    return torch.load(saved, weights_only=True)["model"], output


def _end(job: subprocess.Popen) -> None:
    """Also what the simulator has started, in a session of its own."""
    if job.poll() is not None:
        return
    import psutil

    for process in psutil.Process(job.pid).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    job.kill()


@pytest.mark.parametrize("format", ["pytorch", "numpy"])
def test_two_rounds_of_two_clients(tmp_path, format):
    model, output = simulate(tmp_path, format=format, bad_round="-1")
    for key in ("q.lora_A.weight", "q.lora_B.weight"):
        torch.testing.assert_close(model[key], 2.5**2 * torch.eye(2), rtol=0, atol=1e-5)
    assert "Finished FedAvg" in output


def test_a_client_that_is_not_finite_ends_the_job(tmp_path):
    model, output = simulate(tmp_path, format="pytorch", bad_round="1")
    torch.testing.assert_close(model["q.lora_A.weight"], 2.5 * torch.eye(2), rtol=0, atol=1e-5)
    assert "Finished FedAvg" not in output
    assert "client 'site-2'" in output
