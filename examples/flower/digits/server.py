"""The server: aggregates the clients' adapters and tests the global one after every round."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits import federation
from fedrot.errors import FedrotError
from fedrot.flower import FedRot, FedRotAvg
from fedrot.simulation.adapter import set_factors

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    options, setup = context.run_config, federation(context)
    model = set_factors(setup.model, setup.start().factors)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        return MetricRecord(setup.config.task.evaluate(model, setup.data.test))

    result = strategy(str(options["method"]), float(options["lam"]), int(options["clients"])).start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(options["rounds"]),
        evaluate_fn=evaluate,
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(str(options["out"]), save_embedding_layers=False)


def strategy(method: str, lam: float, clients: int) -> Strategy:
    nodes = {
        "min_train_nodes": clients,
        "min_available_nodes": clients,
        "fraction_evaluate": 0.0,  # the server has test data
    }
    if method == "fedrot":
        return FedRot(FedAvg(**nodes), lam=lam)
    if method == "fused":
        return FedRotAvg(lam=lam, **nodes)
    if method in ("fedavg", "mod"):
        return FedAvg(**nodes)
    raise FedrotError(f"method must be fedrot, fused, mod or fedavg, got {method!r}")
