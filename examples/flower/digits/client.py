"""The client: takes the global adapter, trains it on its own digits, sends it back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from digits import federation
from fedrot.flower import FedRotMod
from fedrot.gauge import regauge
from fedrot.simulation.adapter import get_factors, set_factors
from fedrot.simulation.local import draw_batches, train_clients
from fedrot.simulation.seeding import generator


def align(message: Message, context: Context, call_next) -> Message:
    """`FedRotMod` where the run asks for it. An app of your own just lists the mod."""
    if context.run_config["method"] != "mod":
        return call_next(message, context)
    return FedRotMod(lam=context.run_config["lam"])(message, context, call_next)


app = ClientApp(mods=[align])


@app.train()
def train(message: Message, context: Context) -> Message:
    setup, client = federation(context), int(context.node_config["partition-id"])
    config, model, round = setup.config, setup.model, int(message.content["config"]["server-round"])

    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    examples = setup.examples[client]
    batches = draw_batches(examples, config.local, generator(config.seed, "batches", round, client))
    done = train_clients(model, [get_factors(model)], setup.data.train, [batches], config.local)
    (factors,) = done.factors
    if context.run_config["regauge"]:
        factors = regauge(factors, generator(config.seed, "gauge", round, client))
    set_factors(model, factors)

    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train-loss": float(done.losses), "num-examples": len(examples)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
