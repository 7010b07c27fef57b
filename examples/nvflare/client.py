"""What every NVFLARE client runs: receive the global adapter, train it, return it."""

from __future__ import annotations

import sys

import nvflare.client as flare
import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.client import FLModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedrot.config import load
from fedrot.gauge import regauge
from fedrot.options import parse_overrides
from fedrot.simulation.adapter import get_factors, set_factors
from fedrot.simulation.local import draw_batches, train_clients
from fedrot.simulation.rounds import prepare
from fedrot.simulation.seeding import generator


def main(overrides: list[str]) -> None:
    config = load(parse_overrides(overrides))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    federation = prepare(config)
    model, data, seed = federation.model, federation.data, config.seed

    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    weight = len(federation.examples[client]) if config.clients.weights == "samples" else 1
    while flare.is_running():
        received = flare.receive()
        round = received.current_round
        set_peft_model_state_dict(model, received.params)
        metrics = config.task.evaluate(model, data.test)

        draw = generator(seed, "batches", round, client)
        batches = draw_batches(federation.examples[client], config.local, draw)
        start = get_factors(model)
        masks = generator(seed, "dropout", round, client, device=model.device)
        (factors,) = train_clients(
            model, [start], data.train, [batches], config.local, dropout=[masks]
        ).factors
        if config.regauge:
            factors = regauge(factors, generator(seed, "gauge", round, client))

        params = get_peft_model_state_dict(set_factors(model, factors))
        meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight}
        flare.send(FLModel(params=params, metrics=metrics, meta=meta))


if __name__ == "__main__":
    main(sys.argv[1:])
