"""Writing the paged KV cache in plain torch."""

import torch
from torch import Tensor

from oracle import norm


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x, a scale for each run of the last dimension; uint8 = e4m3, int8 symmetric.

    On the CPU: on CUDA torch divides by a number as it multiplies with its reciprocal.
    """
    device, x = x.device, x.cpu().float()
    largest = 448.0 if dtype == torch.uint8 else 127.0
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = amax / largest
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (x / scale[..., None]).clamp(-largest, largest)
    is_finite = x.isfinite().all(-1)
    codes = torch.where(is_finite[..., None], codes, 0.0)
    scale = torch.where(is_finite, scale, float("nan"))
    if dtype == torch.uint8:
        rounded = codes.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        rounded = codes.round().to(torch.int8)
    return rounded.to(device), scale.to(device)


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for, float64."""
    values = codes.view(torch.float8_e4m3fn).float() if codes.dtype == torch.uint8 else codes
    return values.double() * scale.double()[..., None]


def dequantize_latent(codes: Tensor, scale: Tensor, pe_cache: Tensor) -> Tensor:
    """Rows of a latent cache, float64: 128 columns share a scale, rotary columns follow."""
    parts = [
        dequantize_rows(part, scale[..., i]) for i, part in enumerate(codes.split(128, dim=-1))
    ]
    return torch.cat([*parts, pe_cache.double()], -1)


def write_kv(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    kv_scale: Tensor | None = None,
) -> None:
    block_size = kv_cache.shape[2]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    if kv_scale is not None:
        for part, x in enumerate((k, v)):
            codes, scale = quantize_rows(x[kept], kv_cache.dtype)
            kv_cache[:, part, ..., : x.shape[2]][blocks, offsets] = codes
            kv_scale[:, part].transpose(1, 2)[blocks, offsets] = scale
        return
    kv_cache[:, 0, ..., : k.shape[2]][blocks, offsets] = k[kept].to(kv_cache.dtype)
    kv_cache[:, 1, ..., : v.shape[2]][blocks, offsets] = v[kept].to(kv_cache.dtype)


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
    norm.rotary(positions, cos_sin, q, k, interleaved=interleaved)
    write_kv(k, v, slot_mapping, kv_cache, kv_scale=kv_scale)


def write_mla(
    kv_latent: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    kv_scale: Tensor | None = None,
    pe_cache: Tensor | None = None,
) -> None:
    block_size = kv_cache.shape[1]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    width = kv_latent.shape[1]
    if kv_scale is not None and pe_cache is not None:
        for group, part in enumerate(kv_latent[kept].split(128, dim=-1)):
            codes, scale = quantize_rows(part, kv_cache.dtype)
            first = 128 * group
            kv_cache[..., first : first + codes.shape[-1]][blocks, offsets] = codes
            kv_scale[..., group][blocks, offsets] = scale
        pe_cache[blocks, offsets] = k_pe[kept].to(pe_cache.dtype)
        return
    kv_cache[blocks, offsets, :width] = kv_latent[kept].to(kv_cache.dtype)
    kv_cache[blocks, offsets, width:] = k_pe[kept].to(kv_cache.dtype)
