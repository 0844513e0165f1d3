"""The memory pool against a model of it: two hundred thousand steps with failing drivers."""

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from memory.pool_machine import PoolMachine

NUM_SHARDS = 20
STEPS_PER_SHARD = 10_000

SETTINGS = settings(
    max_examples=40,
    stateful_step_count=100,
    derandomize=False,  # the seed says which sequences a shard draws
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_pool_agrees_with_its_model(shard: int) -> None:
    """Each shard draws its own sequences of operations, the same ones at every run."""
    Shard = type("Shard", (PoolMachine,), {"num_steps": 0})  # noqa: N806
    part = 0
    while Shard.num_steps < STEPS_PER_SHARD:
        run_state_machine_as_test(seed(1000 * shard + part)(Shard), settings=SETTINGS)
        part += 1
