"""The memory pool: one owner for weights, KV cache and workspaces, under one budget."""

from fastgpt.memory.pool import GPTMemoryPool, device_memory
from fastgpt.memory.report import PoolEntry, PoolStats

__all__ = ["GPTMemoryPool", "PoolEntry", "PoolStats", "device_memory"]
