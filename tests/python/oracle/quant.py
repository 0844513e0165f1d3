"""Canonical quantized forms in plain torch: scales as documented, codes rounded by torch."""

import torch
from torch import Tensor

from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor


def quantize(x: Tensor, spec: str | dict[str, object]) -> QuantizedTensor:
    stored = round_tensor(x, Format.parse(spec), "x")
    assert isinstance(stored, QuantizedTensor)
    return stored


def e4m3(packed: Tensor) -> Tensor:
    return packed.view(torch.float8_e4m3fn).to(torch.float32)
