"""Writing keys and values of new tokens into the paged KV cache."""

import torch
from torch import Tensor

from fastgpt.ops._library import call

__all__ = ["rotary_write_kv", "write_kv", "write_mla"]

_ops = torch.ops.fastgpt


def write_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    """Store each token's key and value in its slot of the cache, in place.

    Args:
        k: [num_tokens, num_kv_heads, head_dim_qk]; float32, float16 or bfloat16, last dimension
            contiguous.
        v: [num_tokens, num_kv_heads, head_dim_v], dtype of k.
        slot_mapping: [num_tokens], int64, block_id * block_size + offset; negative = skip (padding
            rows). On CUDA a slot past the cache is skipped too.
        kv_cache: one layer, [num_blocks, 2, block_size, num_kv_heads, width >= both head sizes],
            any float dtype, any strides but the last; changed. Columns past a head size keep what
            they hold.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a slot past the
            cache.

    Source: PagedAttention, arXiv:2309.06180.
    """
    call(_ops.write_kv.default, k, v, slot_mapping, kv_cache)


def rotary_write_kv(
    positions: Tensor,
    cos_sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place, then store k and v in their slots: rotary and write_kv in one.

    Bit for bit what the two calls do. k and v must not overlap q.

    Args:
        positions, cos_sin, interleaved: as in rotary.
        q: [num_tokens, num_heads, >= rot_dim]; float32, float16 or bfloat16; changed.
        k: [num_tokens, num_kv_heads, head_dim_qk >= rot_dim], dtype of q; changed.
        v: [num_tokens, num_kv_heads, head_dim_v], dtype of q.
        slot_mapping, kv_cache: as in write_kv.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a position outside
            the table and for a slot past the cache, before anything is changed.

    Sources: RoPE, arXiv:2104.09864; PagedAttention, arXiv:2309.06180.
    """
    call(
        _ops.rotary_write_kv.default,
        positions, cos_sin, q, k, v, slot_mapping, kv_cache, interleaved,
    )  # fmt: skip


def write_mla(kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    """Store each token's latent and rotary key side by side in its slot, in place.

    Args:
        kv_latent: [num_tokens, 512]; float32, float16 or bfloat16, last dimension contiguous.
        k_pe: [num_tokens, 64], dtype of kv_latent.
        slot_mapping: [num_tokens], int64, as in write_kv.
        kv_cache: one layer, [num_blocks, block_size, 576], any float dtype; changed.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a slot past the
            cache.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    call(_ops.write_mla.default, kv_latent, k_pe, slot_mapping, kv_cache)


@torch.library.register_fake("fastgpt::write_kv")
def _(k: Tensor, v: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::rotary_write_kv")
def _(
    positions: Tensor,
    cos_sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    interleaved: bool,
) -> None:
    return None


@torch.library.register_fake("fastgpt::write_mla")
def _(kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    return None
