"""Row-wise operations: normalization, rotary embedding, gated activation, embedding lookup."""

import torch
from torch import Tensor

from fastgpt.ops._library import call
from fastgpt.ops.scratch import empty, empty_like

__all__ = ["add_rms_norm", "embedding", "rms_norm", "rotary", "silu_mul"]

_ops = torch.ops.fastgpt


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    Args:
        x: [num_rows, hidden] or [num_tokens, num_heads, head_dim]; float32, float16 or bfloat16,
            last dimension contiguous.
        weight: gains, [hidden], any float dtype; None = 1.
        eps: added to the mean square, >= 0.
        out: where to write, shape and dtype of x; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.

    Source: RMSNorm, arXiv:1910.07467.
    """
    if out is None:
        out = empty_like(x)
    call(_ops.rms_norm.default, x, weight, eps, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Add x to residual in place, then return the RMS norm of the sum.

    The sum is rounded to residual's dtype before it is normalized in float32, so that the result
    is the norm of what residual then holds.

    Args:
        x: [num_rows, hidden]; float32, float16 or bfloat16, last dimension contiguous.
        residual: [num_rows, hidden], any float dtype; changed.
        weight: gains, [hidden], any float dtype; None = 1.
        eps: added to the mean square, >= 0.
        out: where to write, shape and dtype of x; may be x itself; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = empty_like(x)
    call(_ops.add_rms_norm.default, x, residual, weight, eps, out)
    return out


def rotary(
    positions: Tensor,
    cos_sin: Tensor,
    q: Tensor,
    k: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate the first rot_dim columns of every head of q and k in place.

    Column pairs (a, b) become (a cos - b sin, b cos + a sin). The pairs are (i, i + rot_dim / 2),
    or (2i, 2i + 1) when interleaved. To rotate the last columns of a head, pass a slice view.

    Args:
        positions: [num_tokens], int64, each in 0 .. max_position - 1. On CUDA a token with another
            position becomes NaN.
        cos_sin: [max_position, rot_dim], float32: rot_dim / 2 cosines, then rot_dim / 2 sines.
        q: [num_tokens, num_heads, >= rot_dim]; float32, float16 or bfloat16; changed.
        k: [num_tokens, num_kv_heads, >= rot_dim], dtype of q; changed; None = q alone.
        interleaved: which columns form a pair.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a bad position.

    Source: RoPE, arXiv:2104.09864.
    """
    call(_ops.rotary.default, positions, cos_sin, q, k, interleaved)


def silu_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up where x holds gate and up side by side.

    Args:
        x: [num_rows, 2 * width]; float32, float16 or bfloat16, last dimension contiguous.
        out: where to write, [num_rows, width], dtype of x; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.

    Source: SwiGLU, arXiv:2002.05202.
    """
    if out is None:
        out = empty((x.shape[0], x.shape[1] // 2), x.dtype, x.device)
    call(_ops.silu_mul.default, x, out)
    return out


def embedding(
    ids: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Return the rows of weight that ids name.

    Args:
        ids: [num_tokens], int64, each in 0 .. vocab_size - 1. On CUDA, which cannot wait to tell,
            the row of another id is NaN.
        weight: [vocab_size, hidden]; float32, float16 or bfloat16.
        dtype: of an allocated out; None = that of weight.
        out: where to write, [num_tokens, hidden], any float dtype; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a bad id.
    """
    if out is None:
        out = empty((ids.shape[0], weight.shape[1]), dtype or weight.dtype, weight.device)
    call(_ops.embedding.default, ids, weight, out)
    return out


@torch.library.register_fake("fastgpt::rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::rotary")
def _(positions: Tensor, cos_sin: Tensor, q: Tensor, k: Tensor | None, interleaved: bool) -> None:
    return None


@torch.library.register_fake("fastgpt::silu_mul")
def _(x: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::embedding")
def _(ids: Tensor, weight: Tensor, out: Tensor) -> None:
    return None
