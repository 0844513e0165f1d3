"""What the bindings say of tensors that no op takes: the type and the devices they have."""

import pytest
import torch

from fastgpt import ops
from fastgpt.errors import InvalidArgument


def test_a_type_that_no_op_takes_is_named():
    with pytest.raises(InvalidArgument, match="a tensor is of type Double; expected float32"):
        ops.rms_norm(torch.zeros(2, 8, dtype=torch.float64), torch.ones(8), 1e-6)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_named():
    with pytest.raises(InvalidArgument, match=r"tensors are on (cpu and cuda:0|cuda:0 and cpu);"):
        ops.rms_norm(torch.zeros(2, 8, device="cuda"), torch.ones(8), 1e-6)
