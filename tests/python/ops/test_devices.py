"""An op runs on the device of its tensors, whatever device the thread has current."""

import pytest
import torch

from fastgpt import ops


@pytest.mark.gpu
def test_op_runs_where_its_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(3, 64)
    with torch.cuda.device(0):
        out = ops.rms_norm(x.to("cuda:1"), None, 1e-6)
        assert torch.cuda.current_device() == 0
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.cpu(), ops.rms_norm(x, None, 1e-6))
