"""Writing the paged KV cache in plain torch."""

from torch import Tensor

from oracle import norm


def write_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    block_size = kv_cache.shape[2]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
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
) -> None:
    norm.rotary(positions, cos_sin, q, k, interleaved=interleaved)
    write_kv(k, v, slot_mapping, kv_cache)


def write_mla(kv_latent: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    block_size = kv_cache.shape[1]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    width = kv_latent.shape[1]
    kv_cache[blocks, offsets, :width] = kv_latent[kept].to(kv_cache.dtype)
    kv_cache[blocks, offsets, width:] = k_pe[kept].to(kv_cache.dtype)
