"""A model without weights whose next token depends on every cached token, through the block table.

A wrong slot, block table, position or recomputation changes its output, so scheduler and cache
bookkeeping are tested in milliseconds.
"""

import os
import time

import torch

from fastgpt.batch import Batch

VOCAB = 262


def next_token(token_ids: list[int]) -> int:
    """Return the greedy successor of a sequence: a polynomial hash of ids and positions."""
    value = 7
    for position, token_id in enumerate(token_ids):
        value = (value * 31 + (token_id + 1) * (position + 3)) % 1_000_003
    return value % VOCAB


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """Return the first num_tokens greedy tokens after a prompt."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class FakeLayout:
    """One float per cached token: its id + 1."""

    kind = "gqa"

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        return (1, block_size)

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class FakeModel:
    """Implements the engine's model interface on the CPU.

    Attributes:
        gate: a file descriptor of which each forward pass reads a byte first, or None.
    """

    def __init__(self, max_position: int = 4096, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.gate: int | None = None
        self.vocab_size = VOCAB
        self.max_position = max_position
        self.kv_layout = FakeLayout()
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.batches: list[tuple[int, int]] = []  # (num_reqs, num_tokens) of each forward

    def reserve_workspace(self, max_tokens: int, max_seq_len: int) -> None:
        pass

    def use_kv_cache_dtype(self, cache_dtype: str) -> None:
        assert cache_dtype == "auto"

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            os.read(self.gate, 1)
        time.sleep(self.step_s)
        self.batches.append((batch.num_reqs, batch.num_tokens))
        flat = kv_cache.view(-1)
        block_size = kv_cache.shape[-1]
        for slot, token_id in zip(
            batch.slot_mapping.tolist(), batch.token_ids.tolist(), strict=True
        ):
            if slot >= 0:
                flat[slot] = token_id + 1
        hidden = torch.zeros(batch.num_tokens, 1)
        starts = batch.cu_seqlens_q.tolist()
        positions = batch.positions.tolist()
        for i, seq_len in enumerate(batch.seq_lens.tolist()):
            if seq_len == 0:
                continue
            table = batch.block_tables[i].tolist()
            cached = [
                int(flat[table[p // block_size] * block_size + p % block_size]) - 1
                for p in range(seq_len)
            ]
            assert positions[starts[i + 1] - 1] == seq_len - 1
            hidden[starts[i + 1] - 1] = next_token(cached)
        return hidden

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        # A peak at the hash, and smaller logits elsewhere that also depend on it.
        columns = torch.arange(VOCAB, dtype=torch.float32)
        logits = torch.cos(hidden_rows * 0.37 + columns * 0.11)
        logits.scatter_(1, hidden_rows.long(), 4.0)
        return logits
