"""From a path to a model on its device, with tokenizer and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgpt.batch import Batch
from fastgpt.checkpoint import Checkpoint, open_checkpoint
from fastgpt.engine.swap import WeightSwap
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.logging import get_logger
from fastgpt.memory import GPTMemoryPool, device_memory
from fastgpt.models import registry
from fastgpt.models.placement import resolve_device, resolve_dtype
from fastgpt.tokenizer import Tokenizer
from fastgpt.units import format_bytes, resolve_bytes

__all__ = [
    "EngineMemory",
    "EngineModel",
    "LoadedModel",
    "load_model",
    "resolve_device",
    "resolve_dtype",
]


_logger = get_logger(__name__)

_HOST_BUDGET = "0.9"  # of the free host memory: what evicted weights may take


class KVLayoutLike(Protocol):
    """What the engine asks of a model's cache layout."""

    def block_shape(self, block_size: int) -> Sequence[int]:
        """Return the shape of one KV block of block_size tokens, all layers."""

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the cache's tensor for a model of `dtype`."""


class EngineModel(Protocol):
    """What the engine asks of a model (`fastgpt.models` has them)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def kv_layout(self) -> KVLayoutLike: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor: ...
    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor: ...
    def reserve_workspace(self, max_tokens: int, max_seq_len: int) -> None: ...
    def use_kv_cache_dtype(self, cache_dtype: str) -> None: ...


class EngineMemory:
    """The engine's view of its pool: named tensors that live as long as the engine.

    Attributes:
        swap: what places weights that may leave the device; None: all stay.
    """

    def __init__(self, pool: GPTMemoryPool, swap: WeightSwap | None = None) -> None:
        self.pool = pool
        self.swap = swap

    def allocate_weight(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> torch.Tensor:
        """Return memory for a weight. Raises OutOfMemory if the budget has no room."""
        if self.swap is None:
            return self.allocate(shape, dtype, name)
        return self.swap.allocate(shape, dtype, name)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> torch.Tensor:
        """Return a new tensor of the pool.

        Raises:
            OutOfMemory: if the budget has no room.
        """
        return self.pool.allocate(shape, name, dtype=dtype)

    def left_bytes(self, at_least: int = 0) -> int:
        """Return the largest single allocation that the budget still allows.

        at_least: with swap, bytes for which weights may leave the device.
        """
        if self.swap is not None:
            return self.swap.left_bytes(at_least)
        stats = self.pool.stats()
        return max(stats.largest_free_bytes, stats.budget_bytes - stats.reserved_bytes)

    def stats(self) -> dict[str, Any]:
        """Return the pool's figures by name."""
        stats = self.pool.stats()
        return {name: getattr(stats, name) for name in stats.__dataclass_fields__}


@dataclass
class LoadedModel:
    """A model ready to serve.

    Attributes:
        model: the model.
        name: its file or directory name without suffix.
        architecture: the first of the config's architectures.
        device: where it is.
        memory: its pool.
        tokenizer: None when the checkpoint carries none.
        generation_config: the checkpoint's sampling defaults.
        eos_ids: ids that end a text.
    """

    model: EngineModel
    name: str
    architecture: str
    device: torch.device
    memory: EngineMemory
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    eos_ids: frozenset[int]


def make_memory(
    device: torch.device, memory_pool_size: str | int | None, *, swap_to_cpu: bool = False
) -> EngineMemory:
    """Return a pool; one log line when the budget asked for is more than the device has free."""
    free_bytes, _ = device_memory(device)
    host_budget = _HOST_BUDGET if swap_to_cpu else None
    pool = GPTMemoryPool(device, budget=memory_pool_size, host_budget=host_budget)
    asked = pool.budget_bytes
    if memory_pool_size is not None:
        asked = resolve_bytes(memory_pool_size, free_bytes)
    if asked > max(pool.budget_bytes, free_bytes):
        _logger.warning(
            "memory_pool_size %s is more than the %s free; lowered to %s",
            memory_pool_size,
            format_bytes(free_bytes),
            format_bytes(pool.budget_bytes),
        )
    return EngineMemory(pool, WeightSwap(pool) if swap_to_cpu else None)


def load_model(
    source: Any,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory_pool_size: str | int | None = None,
    swap_to_cpu: bool = False,
    max_length: int | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> LoadedModel:
    """Return a model on its device, its weights in a new pool.

    Args:
        source: a path, an open Checkpoint, or a Model, which is taken as it is.
        device, dtype: see resolve_device, resolve_dtype; a Model's own are kept.
        memory_pool_size: the pool's budget.
        swap_to_cpu: weights that the budget has no room for stay in host memory. Then open
            memory.swap before the model runs.
        max_length: positions the model must know; None: as the checkpoint says.
        tokenizer: a Tokenizer, a directory, or None for the checkpoint's.

    Raises:
        CheckpointError: if the file is damaged, or of an unknown architecture.
        ConfigError, DeviceError, OutOfMemory: if device, dtype or budget do not serve.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.from_checkpoint(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            f"tokenizer is of type {type(tokenizer).__name__}; expected a Tokenizer or a directory"
        )
    if not isinstance(source, str | Path | Checkpoint):
        if not hasattr(source, "kv_layout"):
            raise ConfigError(
                f"the model is of type {type(source).__name__}; expected a path, a Checkpoint or a "
                "model of fastgpt.models"
            )
        model: EngineModel = source
        if swap_to_cpu:
            raise ConfigError(
                f"swap_to_cpu is set, but {type(model).__name__} has its weights already; give the "
                "engine its path instead"
            )
        return LoadedModel(
            model=model,
            name=type(model).__name__,
            architecture=type(model).__name__,
            device=model.device,
            memory=make_memory(model.device, memory_pool_size),
            tokenizer=tokenizer,
            generation_config=tokenizer.generation_config if tokenizer else {},
            eos_ids=tokenizer.eos_ids if tokenizer else frozenset(),
        )
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.path} holds a module that is not in fastgpt.models; "
            "use fastgpt.load(path, into=module)"
        )
    family = registry.family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    if tokenizer is None and checkpoint.tokenizer_json is not None:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    on = resolve_device(device)
    memory = make_memory(on, memory_pool_size, swap_to_cpu=swap_to_cpu)
    positions = config.max_position if max_length is None else min(max_length, config.max_position)
    built = family.build(
        config,
        checkpoint.read,
        on,
        resolve_dtype(dtype, on, checkpoint.config, checkpoint.fp16_overflows),
        memory.allocate_weight,
        max_position=positions,
    )
    if memory.swap is not None:
        memory.swap.finish_layer()
    architectures = checkpoint.config.get("architectures") or [family.name]
    generation_config = checkpoint.generation_config or (
        tokenizer.generation_config if tokenizer else {}
    )
    eos = {*_as_ids(checkpoint.config.get("eos_token_id")),
           *_as_ids(generation_config.get("eos_token_id"))}  # fmt: skip
    return LoadedModel(
        model=built,
        name=Path(checkpoint.path).stem,
        architecture=str(architectures[0]),
        device=on,
        memory=memory,
        tokenizer=tokenizer,
        generation_config=generation_config,
        eos_ids=frozenset(eos) | (tokenizer.eos_ids if tokenizer else frozenset()),
    )


def _as_ids(value: Any) -> list[int]:
    """Return the ids of a config field that is one id, a list of ids, or absent."""
    return (
        [] if value is None else [int(v) for v in (value if isinstance(value, list) else [value])]
    )
