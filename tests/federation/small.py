"""Options of a federation small enough for tests."""

SMALL_ONE_SHOT = [
    "task.pretrain_steps=60",
    "clients.count=4",
    "local.steps=3",
    "local.batch_size=8",
]
SMALL = [*SMALL_ONE_SHOT, "rounds=3"]
