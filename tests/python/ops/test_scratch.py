"""Scratch: results that live long enough never share bytes, and a step repeats its places."""

import threading

import pytest
import torch

from fastgpt.errors import InvalidArgument
from fastgpt.ops.scratch import Scratch, empty, next_layer

CPU = torch.device("cpu")


def run_step(scratch: Scratch, num_layers: int, rows: int) -> list[torch.Tensor]:
    """Take results as a model does; every result is stamped and checked while it must live."""
    taken = []
    with scratch.step():
        residual = empty((rows, 8), torch.float32, CPU).fill_(-1)
        taken.append(residual)
        x = empty((rows, 8), torch.float32, CPU).fill_(0)
        for layer in range(num_layers):
            next_layer()
            wide = empty((rows, 40), torch.bfloat16, CPU).fill_(100 + layer)
            ids = empty((rows, 3), torch.int32, CPU).fill_(layer)
            y = empty((rows, 8), torch.float32, CPU).fill_(layer + 1)
            assert bool((x == layer).all()), "the result of the layer before"
            assert bool((wide == 100 + layer).all())
            assert bool((ids == layer).all())
            taken += [wide, ids, y]
            x = y
        next_layer(last=True)
        logits = empty((rows, 100), torch.float32, CPU).fill_(7)
        assert bool((x == num_layers).all())
        assert bool((residual == -1).all())
        assert bool((logits == 7).all())
        taken.append(logits)
    return taken


@pytest.mark.parametrize("num_layers", [0, 1, 2, 5])
def test_scratch_repeats_its_places_and_keeps_what_lives(num_layers: int) -> None:
    measuring = Scratch(None)
    run_step(measuring, num_layers, 4)
    scratch = measuring.plan(torch.empty(measuring.num_bytes, dtype=torch.uint8))
    first = run_step(scratch, num_layers, 4)
    second = run_step(scratch, num_layers, 4)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    run_step(scratch, num_layers, 1)  # smaller steps fit as well
    assert measuring.num_bytes <= 256 * (3 + 6) + 1024 * 2 + 2 * 4 * 256


def test_scratch_refuses_a_larger_step_and_too_little_memory() -> None:
    measuring = Scratch(None)
    run_step(measuring, 3, 4)
    with pytest.raises(InvalidArgument, match="a step needs"):
        measuring.plan(torch.empty(measuring.num_bytes - 1, dtype=torch.uint8))
    scratch = measuring.plan(torch.empty(measuring.num_bytes, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="larger than the one that was measured"):
        run_step(scratch, 3, 100)
    outside = empty((2, 2), torch.float32, CPU)
    assert outside.untyped_storage().nbytes() == 16, "a failed step ends its scope"


def test_scratch_belongs_to_its_thread() -> None:
    measuring = Scratch(None)
    run_step(measuring, 1, 4)
    memory = torch.empty(measuring.num_bytes, dtype=torch.uint8)
    scratch = measuring.plan(memory)
    other: list[int] = []
    with scratch.step():
        inside = empty((2,), torch.float32, CPU)
        thread = threading.Thread(
            target=lambda: other.append(empty((2,), torch.float32, CPU).untyped_storage().nbytes())
        )
        thread.start()
        thread.join()
        with scratch.step():  # nested, then back
            pass
        assert empty((2,), torch.float32, CPU).untyped_storage().nbytes() == memory.nbytes
    assert other == [8]
    assert inside.untyped_storage().data_ptr() == memory.data_ptr()
