"""From scheduled requests to the tensors a step reads.

All inputs of a step lie in one host buffer; on a GPU it is pinned and reaches the device by one
asynchronous copy, at addresses that never change (CUDA graphs read them again and again).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastgpt.batch import Batch
from fastgpt.engine.scheduler import ScheduledRequest

__all__ = ["Allocate", "InputBuffers", "SamplingInputs", "StepInputs", "allocate_with_torch"]

_ALIGNMENT = 64


@dataclass
class SamplingInputs:
    """How to choose the next token of n rows of logits; every tensor is [n].

    Attributes:
        temperature, top_p, min_p: fp32. top_k: int32. seeds, positions: int64.
        slots: int64, rows of the sampler's token history; -1 for padding rows.
        repetition, presence, frequency: fp32.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass
class StepInputs:
    """What one step reads.

    Attributes:
        batch: for the model.
        sampling: for the sampler; rows match batch.logits_indices.
        num_samples: rows that are not padding.
        has_penalties: whether any row has a penalty.
        is_decode: whether every request brings exactly one token and wants one.
    """

    batch: Batch
    sampling: SamplingInputs
    num_samples: int
    has_penalties: bool
    is_decode: bool


Allocate = Callable[[tuple[int, ...], torch.dtype, str], torch.Tensor]


def allocate_with_torch(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return new memory of the CPU for a buffer: what stands in for a pool in tests."""
    return torch.empty(shape, dtype=dtype)


class InputBuffers:
    """Owns the input buffers of one engine; a step's inputs are views, valid until the next build.

    Args:
        device: where the model reads.
        max_batch: most requests in a step.
        max_batch_tokens: most tokens in a step.
        max_blocks: most blocks of one request.
        block_size: tokens in a block.
        max_length: most tokens of one request.
        allocate: (shape, dtype, name) -> uninitialized memory on the device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_batch: int,
        max_batch_tokens: int,
        max_blocks: int,
        block_size: int,
        max_length: int,
        allocate: Allocate = allocate_with_torch,
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.max_length = max_length
        self.max_batch = max_batch
        n, t = max_batch, max_batch_tokens
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "token_ids": ((t,), torch.int64),
            "positions": ((t,), torch.int64),
            "slot_mapping": ((t,), torch.int64),
            "block_tables": ((n, max_blocks), torch.int32),
            "cu_seqlens_q": ((n + 1,), torch.int32),
            "seq_lens": ((n,), torch.int32),
            "logits_indices": ((n,), torch.int64),
            "temperature": ((n,), torch.float32),
            "top_k": ((n,), torch.int32),
            "top_p": ((n,), torch.float32),
            "min_p": ((n,), torch.float32),
            "seeds": ((n,), torch.int64),
            "sample_positions": ((n,), torch.int64),
            "slots": ((n,), torch.int64),
            "repetition": ((n,), torch.float32),
            "presence": ((n,), torch.float32),
            "frequency": ((n,), torch.float32),
        }
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, dtype) in layout.items():
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + int(np.prod(shape)) * dtype.itemsize
            offsets[name] = (begin, end)
        on_gpu = device.type == "cuda"
        self._device_bytes = allocate((end,), torch.uint8, "engine.inputs").zero_()
        # The host's side of the copy: a few KiB of page-locked memory, which a pool does not have.
        self._host_bytes = self._device_bytes
        if on_gpu:
            self._host_bytes = torch.zeros(end, dtype=torch.uint8, pin_memory=True)

        def view(storage: torch.Tensor, name: str) -> torch.Tensor:
            shape, dtype = layout[name]
            begin, stop = offsets[name]
            return storage[begin:stop].view(dtype).view(shape)

        self._host: dict[str, npt.NDArray[Any]] = {
            name: view(self._host_bytes, name).numpy() for name in layout
        }
        self._device = {name: view(self._device_bytes, name) for name in layout}

    def build(self, scheduled: list[ScheduledRequest], num_padded: int = 0) -> StepInputs:
        """Fill the buffers for one step and start their copy to the device.

        Args:
            scheduled: the step's requests, at least one.
            num_padded: for a decode-only step: pad to this many rows (0 = no padding). A padding
                row has token 0, slot -1, seq_len 0 and is sampled greedily.
        """
        host = self._host
        num_tokens = 0
        num_samples = 0
        max_seqlen_q = 1
        max_seq_len = 1
        has_penalties = False
        block_tables, cu_seqlens_q = host["block_tables"], host["cu_seqlens_q"]
        block_size = self.block_size
        for i, item in enumerate(scheduled):
            request, count = item.request, item.num_tokens
            start = request.num_cached_tokens
            stop = start + count
            table = request.block_table
            block_tables[i, : len(table)] = table
            if count == 1:
                host["token_ids"][num_tokens] = request.token_ids[start]
                host["positions"][num_tokens] = start
                host["slot_mapping"][num_tokens] = (
                    table[start // block_size] * block_size + start % block_size
                )
            else:
                span = slice(num_tokens, num_tokens + count)
                positions = np.arange(start, stop)
                host["token_ids"][span] = request.token_ids[start:stop]
                host["positions"][span] = positions
                host["slot_mapping"][span] = (
                    block_tables[i, positions // block_size] * np.int64(block_size)
                    + positions % block_size
                )
                max_seqlen_q = max(max_seqlen_q, count)
            num_tokens += count
            cu_seqlens_q[i + 1] = num_tokens
            host["seq_lens"][i] = stop
            max_seq_len = max(max_seq_len, stop)
            if item.needs_sample:
                self._set_sampling(num_samples, item, num_tokens - 1)
                has_penalties = has_penalties or request.params.has_penalties
                num_samples += 1
        num_reqs = len(scheduled)
        is_decode = max_seqlen_q == 1 and num_samples == num_reqs
        num_rows = num_samples
        if num_padded > num_reqs:
            self._pad(num_reqs, num_padded)
            num_reqs = num_tokens = num_rows = num_padded
            max_seq_len = self.max_length
        if self._device_bytes is not self._host_bytes:
            self._device_bytes.copy_(self._host_bytes, non_blocking=True)
        return self._views(
            num_reqs, num_tokens, num_rows, max_seqlen_q, max_seq_len, num_samples,
            has_penalties, is_decode,
        )  # fmt: skip

    def build_padding(self, num_rows: int) -> StepInputs:
        """Fill the buffers with num_rows padding rows (to warm up and to capture graphs)."""
        self._pad(0, num_rows)
        if self._device_bytes is not self._host_bytes:
            self._device_bytes.copy_(self._host_bytes, non_blocking=True)
        return self._views(num_rows, num_rows, num_rows, 1, self.max_length, 0, False, True)

    def build_prefill_padding(self, num_tokens: int) -> StepInputs:
        """Fill the buffers with one empty request of num_tokens tokens (to measure and warm up)."""
        host = self._host
        self._pad(0, 1)
        for name in ("token_ids", "positions"):
            host[name][:num_tokens] = 0
        host["slot_mapping"][:num_tokens] = -1
        host["cu_seqlens_q"][1] = num_tokens
        if self._device_bytes is not self._host_bytes:
            self._device_bytes.copy_(self._host_bytes, non_blocking=True)
        max_seq_len = min(num_tokens, self.max_length)  # a step may hold several short prompts
        return self._views(1, num_tokens, 1, num_tokens, max_seq_len, 0, False, False)

    def _set_sampling(self, row: int, item: ScheduledRequest, token_index: int) -> None:
        host, request = self._host, item.request
        params = request.params
        host["logits_indices"][row] = token_index
        host["temperature"][row] = params.temperature
        host["top_k"][row] = params.top_k
        host["top_p"][row] = params.top_p
        host["min_p"][row] = params.min_p
        host["seeds"][row] = request.seed
        host["sample_positions"][row] = request.num_tokens
        host["slots"][row] = request.sampler_slot
        host["repetition"][row] = params.repetition_penalty
        host["presence"][row] = params.presence_penalty
        host["frequency"][row] = params.frequency_penalty

    def _pad(self, begin: int, end: int) -> None:
        host = self._host
        rows = slice(begin, end)
        for name in ("token_ids", "positions", "block_tables", "seq_lens", "temperature", "top_k",
                     "min_p", "seeds", "sample_positions", "presence", "frequency"):  # fmt: skip
            host[name][rows] = 0
        for name in ("top_p", "repetition"):
            host[name][rows] = 1
        host["slot_mapping"][rows] = -1
        host["slots"][rows] = -1
        host["logits_indices"][rows] = np.arange(begin, end)
        host["cu_seqlens_q"][begin + 1 : end + 1] = np.arange(begin + 1, end + 1)

    def _views(
        self,
        num_reqs: int,
        num_tokens: int,
        num_rows: int,
        max_seqlen_q: int,
        max_seq_len: int,
        num_samples: int,
        has_penalties: bool,
        is_decode: bool,
    ) -> StepInputs:
        d = self._device
        return StepInputs(
            batch=Batch(
                token_ids=d["token_ids"][:num_tokens],
                positions=d["positions"][:num_tokens],
                slot_mapping=d["slot_mapping"][:num_tokens],
                block_tables=d["block_tables"][:num_reqs],
                cu_seqlens_q=d["cu_seqlens_q"][: num_reqs + 1],
                seq_lens=d["seq_lens"][:num_reqs],
                max_seqlen_q=max_seqlen_q,
                max_seq_len=max_seq_len,
                logits_indices=d["logits_indices"][:num_rows],
            ),
            sampling=SamplingInputs(
                temperature=d["temperature"][:num_rows],
                top_k=d["top_k"][:num_rows],
                top_p=d["top_p"][:num_rows],
                min_p=d["min_p"][:num_rows],
                seeds=d["seeds"][:num_rows],
                positions=d["sample_positions"][:num_rows],
                slots=d["slots"][:num_rows],
                repetition=d["repetition"][:num_rows],
                presence=d["presence"][:num_rows],
                frequency=d["frequency"][:num_rows],
            ),
            num_samples=num_samples,
            has_penalties=has_penalties,
            is_decode=is_decode,
        )
