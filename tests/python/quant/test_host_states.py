"""States that pass through the device: nothing is lost on the way, a fork keeps what it had."""

import pytest
import torch

from fastgpt.quant.host_states import HostStates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_parts", [0, 1, 7])
def test_update_keeps_what_was_written(device: str, num_parts: int) -> None:
    parts = [torch.randn(5 + i, 3) for i in range(num_parts)]
    states = HostStates([part.to(device) for part in parts], torch.device(device))
    before = states.fork()
    for at, part in states.update():
        assert part.device.type == device
        part += at + 1
    for at, part in states.visit():
        assert torch.equal(part.cpu(), parts[at] + (at + 1))
        part.zero_()  # a copy
    assert [at for at, _ in states.visit()] == list(range(num_parts))
    for other, offset in ((before, 0), (states, 1)):
        for at, part in other.visit():
            assert torch.equal(part.cpu(), parts[at] + offset * (at + 1))


@pytest.mark.gpu
def test_copies_wait_for_the_work_between_them() -> None:
    """Each part is written by work that takes far longer than its copies."""
    device = torch.device("cuda")
    parts = [torch.full((1 << 20,), float(i)) for i in range(6)]
    states = HostStates(parts, device)
    for _ in range(2):
        for _, part in states.update():
            torch.cuda._sleep(20_000_000)
            part += 1
    for at, part in states.visit():
        assert bool((part == at + 2).all()), at
