"""Every kernel of FastGPT, usable from any PyTorch code and under torch.compile.

Each function exists for CPU and CUDA with the same meaning. It writes into `out` when given and
allocates otherwise. Shapes, dtypes and errors stand in each docstring.
"""

from fastgpt.ops.attention import attention, attention_workspace_bytes, mla_attention
from fastgpt.ops.eight_bit import (
    QuantizedRows,
    fewest_eight_bit_rows,
    has_eight_bit_product,
    linear_eight_bit,
    quantize_rows,
)
from fastgpt.ops.gemm import ArrangedWeight, arrange, batched_linear, grouped_linear, linear
from fastgpt.ops.kv_cache import rotary_write_kv, write_kv, write_mla
from fastgpt.ops.moe import moe_combine, moe_route, moe_sort
from fastgpt.ops.norm import add_rms_norm, embedding, rms_norm, rotary, silu_mul
from fastgpt.ops.quant import (
    dequantize_binary,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    gptq_round,
    quantize_binary,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from fastgpt.ops.sampling import penalize, record_tokens, sample

__all__ = [
    "ArrangedWeight",
    "QuantizedRows",
    "add_rms_norm",
    "arrange",
    "attention",
    "attention_workspace_bytes",
    "batched_linear",
    "dequantize_binary",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "embedding",
    "fewest_eight_bit_rows",
    "gptq_round",
    "grouped_linear",
    "has_eight_bit_product",
    "linear",
    "linear_eight_bit",
    "mla_attention",
    "moe_combine",
    "moe_route",
    "moe_sort",
    "penalize",
    "quantize_binary",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "quantize_rows",
    "record_tokens",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "sample",
    "silu_mul",
    "write_kv",
    "write_mla",
]
