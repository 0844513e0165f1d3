"""Writing keys and values of new tokens into the paged KV cache."""

import torch
from torch import Tensor

from fastgpt.ops._library import call

__all__ = ["rotary_write_kv", "write_kv", "write_mla"]

_ops = torch.ops.fastgpt


def write_kv(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    kv_scale: Tensor | None = None,
) -> None:
    """Store each token's key and value in its slot of the cache, in place.

    A cache of codes is written quantized, each row of a token and head by its own scale:
    x = code * scale with scale = amax / 448 for fp8 and amax / 127 for int8, so that later tokens
    never change what earlier ones read as. A row of zeros has scale 1; a row with a NaN or an
    infinity has scale NaN.

    Args:
        k: [num_tokens, num_kv_heads, head_dim_qk]; float32, float16 or bfloat16, last dimension
            contiguous.
        v: [num_tokens, num_kv_heads, head_dim_v], dtype of k.
        slot_mapping: [num_tokens], int64, block_id * block_size + offset; negative = skip (padding
            rows). On CUDA a slot past the cache is skipped too.
        kv_cache: one layer, [num_blocks, 2, block_size, num_kv_heads, width >= both head sizes],
            any float dtype or codes (uint8: fp8 e4m3, int8), any strides but the last; changed.
            Columns past a head size keep what they hold.
        kv_scale: of codes, [num_blocks, 2, num_kv_heads, block_size], float32, any strides but the
            last; changed. None for a float cache.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a slot past the
            cache.

    Source: PagedAttention, arXiv:2309.06180.
    """
    call(_ops.write_kv.default, k, v, slot_mapping, kv_cache, kv_scale)


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
    kv_scale: Tensor | None = None,
) -> None:
    """Rotate q and k in place, then store k and v in their slots: rotary and write_kv in one.

    Bit for bit what the two calls do. k and v must not overlap q.

    Args:
        positions, cos_sin, interleaved: as in rotary.
        q: [num_tokens, num_heads, >= rot_dim]; float32, float16 or bfloat16; changed.
        k: [num_tokens, num_kv_heads, head_dim_qk >= rot_dim], dtype of q; changed.
        v: [num_tokens, num_kv_heads, head_dim_v], dtype of q.
        slot_mapping, kv_cache, kv_scale: as in write_kv.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a position outside
            the table and for a slot past the cache, before anything is changed.

    Sources: RoPE, arXiv:2104.09864; PagedAttention, arXiv:2309.06180.
    """
    call(
        _ops.rotary_write_kv.default,
        positions, cos_sin, q, k, v, slot_mapping, kv_cache, interleaved, kv_scale,
    )  # fmt: skip


def write_mla(
    kv_latent: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    kv_scale: Tensor | None = None,
    pe_cache: Tensor | None = None,
) -> None:
    """Store each token's latent and rotary key side by side in its slot, in place.

    A cache of codes takes the latent quantized as write_kv does, 128 columns by one scale, and the
    rotary key as it is in a cache of its own: positions do not bear rounding well.

    Args:
        kv_latent: [num_tokens, 512]; float32, float16 or bfloat16, last dimension contiguous.
        k_pe: [num_tokens, 64], dtype of kv_latent.
        slot_mapping: [num_tokens], int64, as in write_kv.
        kv_cache: one layer, [num_blocks, block_size, 576], any float dtype; or codes of the latent
            alone, [num_blocks, block_size, 512]; changed.
        kv_scale: of codes, [num_blocks, block_size, ceil(512 / 128)], float32; changed.
        pe_cache: beside codes, [num_blocks, block_size, 64], any float dtype; changed.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU for a slot past the
            cache.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    call(_ops.write_mla.default, kv_latent, k_pe, slot_mapping, kv_cache, kv_scale, pe_cache)


@torch.library.register_fake("fastgpt::write_kv")
def _(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_scale: Tensor | None = None,
) -> None:
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
    kv_scale: Tensor | None = None,
) -> None:
    return None


@torch.library.register_fake("fastgpt::write_mla")
def _(
    kv_latent: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_scale: Tensor | None = None,
    pe_cache: Tensor | None = None,
) -> None:
    return None
