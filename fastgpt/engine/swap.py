"""Serving a model that is larger than its memory: swap_to_cpu.

While the model loads, the pool evicts the weights whose next use is farthest to host memory. What
is still there when everything else has its place stays on the device. The rest passes through a
window: in every pass over the model each part is copied to its own place in the window while the
parts before it compute. Weights are constants, so nothing is ever copied back.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import _C
from fastgpt.errors import ConfigError
from fastgpt.logging import get_logger
from fastgpt.memory import GPTMemoryPool
from fastgpt.models.model import Model
from fastgpt.units import format_bytes

__all__ = ["WeightSwap"]

_logger = get_logger(__name__)

# A part is what one of a block's two branches reads.
_BRANCHES = {"self_attn": "attention", "mlp": "feed_forward"}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.")

# Smaller tensors (norm gains, biases, scales of rows) stay: they would only hold on to the device
# memory between the large ones. They share entries of _SHARED_BYTES.
_SMALL_BYTES = {"cpu": 4 << 10, "cuda": 256 << 10}
_SHARED_BYTES = {"cpu": 64 << 10, "cuda": 2 << 20}
_ALIGNMENT = 256

_PartKey = tuple[int, str]  # layer, branch


class WeightSwap:
    """Places weights in a pool that evicts, and copies those that do not fit in every pass.

    Args:
        pool: made with host_budget.

    Attributes:
        bytes_per_pass: bytes copied to the device in one pass over the model; 0: the model fits.
    """

    def __init__(self, pool: GPTMemoryPool) -> None:
        self.pool = pool
        self.bytes_per_pass = 0
        self._parts: dict[_PartKey, dict[str, Tensor]] = {}
        self._loading: _PartKey | None = None
        self._shared: Tensor | None = None
        self._num_shared = 0
        self._shared_used = 0
        self._small_bytes = 0
        self._window: _C.WeightWindow | None = None
        self._memory: Tensor | None = None
        self._model: Model | None = None

    # -- loading ------------------------------------------------------------------------------

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
        """Return uninitialized memory for one weight.

        Weights come layer by layer; those of earlier layers may be evicted to make room.

        Raises:
            OutOfMemory: if one layer and what always stays do not fit, or host memory is full.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes < _SMALL_BYTES[self.pool.device.type]:
            return self._share(num_bytes).view(dtype).view(tuple(shape))
        match = _LAYER_NAME.match(name)
        if match is None:
            return self.pool.allocate(shape, name, dtype)
        key = (int(match[1]), _BRANCHES[match[2]])
        if self._loading is not None and key[0] != self._loading[0]:
            self.finish_layer()
        self._loading = key
        tensor = self.pool.allocate(shape, name, dtype)
        self._parts.setdefault(key, {})[name] = tensor
        return tensor

    def _share(self, num_bytes: int) -> Tensor:
        """Return bytes of an entry that small weights share."""
        size = max(num_bytes, 1)
        capacity = _SHARED_BYTES[self.pool.device.type]
        if self._shared is None or self._shared_used + size > capacity:
            name = f"engine.small_weights.{self._num_shared}"
            self._shared = self.pool.allocate((capacity,), name, torch.uint8)
            self._num_shared += 1
            self._shared_used = 0
        start = self._shared_used
        self._shared_used += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._small_bytes += num_bytes
        return self._shared[start : start + num_bytes]

    def finish_layer(self) -> None:
        """Let the pool evict what is loaded so far: from now on it is only read."""
        names = [name for part in self._ordered() for name in self._parts[part]]
        for name in names:
            self.pool.freeze(name)
        self.pool.set_schedule(names)

    def _ordered(self) -> list[_PartKey]:
        """Return the parts in the order of use: a layer's attention comes first."""
        return sorted(self._parts)

    # -- planning -----------------------------------------------------------------------------

    @property
    def layer_bytes(self) -> int:
        """Bytes of all weights that may leave the device."""
        return sum(t.nbytes for part in self._parts.values() for t in part.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of those weights that are on the device."""
        return self.layer_bytes - sum(
            self._parts[part][name].nbytes
            for part, names in self._evicted().items()
            for name in names
        )

    @property
    def window_bytes(self) -> int:
        """Bytes through which the weights that do not stay pass."""
        return 0 if self._memory is None else self._memory.nbytes

    def left_bytes(self, at_least: int) -> int:
        """Return how much the cache may take: what the weights leave, if they all fit beside it.

        If not, a quarter of what is not spoken for, or `at_least` bytes: the more weights stay, the
        less is copied at every step.
        """
        stats = self.pool.stats()
        if self.resident_bytes == self.layer_bytes:
            roomy = max(stats.largest_free_bytes, stats.budget_bytes - stats.reserved_bytes)
        else:
            roomy = 0
        free = stats.budget_bytes - stats.allocated_bytes + self.resident_bytes
        sizes = [[t.nbytes for t in self._parts[part].values()] for part in self._ordered()]
        window_bytes = _C.WeightWindow.bytes_for(sizes) if sizes else 0
        shared = max(at_least, (free - window_bytes) // 4)
        return max(roomy, min(shared, free - window_bytes))

    # -- running ------------------------------------------------------------------------------

    def _evicted(self) -> dict[_PartKey, list[str]]:
        """Return the names of the evicted weights of each part that has any, in order of use."""
        away = {entry.name for entry in self.pool.entries() if entry.is_evicted}
        parts = {key: [n for n in self._parts[key] if n in away] for key in self._ordered()}
        return {key: names for key, names in parts.items() if names}

    def open(self, model: object, beside_bytes: int = 0) -> None:
        """Make the model ready to run: its evicted weights get their places in a window.

        Nothing is evicted after that. To allocate more, call close, allocate, and open again.

        Args:
            model: the model whose weights were allocated here.
            beside_bytes: of the budget, to leave for what does not come from the pool.

        Raises:
            OutOfMemory: if the window does not fit.
            ConfigError: if the model is not one of fastgpt.models.
        """
        self.finish_layer()
        if not isinstance(model, Model):
            raise ConfigError(f"swap_to_cpu serves models of fastgpt.models, not {type(model)}")
        self._model = model
        room = self.pool.allocate((beside_bytes,), dtype=torch.uint8)
        while evicted := self._evicted():
            sizes = [[self._parts[k][n].nbytes for n in names] for k, names in evicted.items()]
            num_bytes = _C.WeightWindow.bytes_for(sizes)
            memory = self.pool.allocate((num_bytes,), dtype=torch.uint8)
            if self._evicted() == evicted:  # room for the window was there
                break
            del memory
        self.pool.set_schedule([])
        del room
        self.pool.trim()
        if not evicted:
            return
        self._memory = memory
        self._window = self.pool.open_window(memory, list(evicted.values()))
        self.bytes_per_pass = self._window.bytes_per_pass
        for i, (key, names) in enumerate(evicted.items()):
            for j, name in enumerate(names):
                tensor = self._parts[key][name]
                start = self._window.address(i, j) - memory.data_ptr()
                place = memory[start : start + tensor.nbytes]
                tensor.data = place.view(tensor.dtype).view(tensor.shape)
            block = model.blocks[key[0]]
            setattr(block, key[1], self._leased(getattr(block, key[1]), i))
        first = model.blocks[0]
        first.attention = self._beginning(first.attention)

    def close(self) -> None:
        """Undo open; the model cannot run until it is opened again."""
        self.finish_layer()
        if self._window is None or self._model is None:
            return
        for block in self._model.blocks:
            for branch in _BRANCHES.values():
                setattr(block, branch, _unwrapped(getattr(block, branch)))
        self._window.close()
        self._window = None
        self._memory = None
        self.bytes_per_pass = 0

    def log(self) -> None:
        """Say in one line what stays and what is copied."""
        if self._window is None:
            _logger.info("swap_to_cpu: all weights fit on %s", self.pool.device)
            return
        _logger.info(
            "swap_to_cpu: of %s of layer weights %s stay on %s, %s pass through a window of %s in "
            "every step",
            format_bytes(self.layer_bytes),
            format_bytes(self.layer_bytes - self.bytes_per_pass),
            self.pool.device,
            format_bytes(self.bytes_per_pass),
            format_bytes(self.window_bytes),
        )

    def _leased(self, branch: Callable[..., Tensor], part: int) -> Callable[..., Tensor]:
        """Return a branch that runs while its part is in the window."""
        window, stream = self._window, self.pool.current_stream
        assert window is not None

        def run(*args: Any) -> Tensor:
            window.acquire(part, stream())
            out = branch(*args)
            window.release(part, stream())
            return out

        run.wrapped = branch  # type: ignore[attr-defined]
        return run

    def _beginning(self, branch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the first branch of a pass, which starts the copies."""
        window, stream = self._window, self.pool.current_stream
        assert window is not None

        def run(*args: Any) -> Tensor:
            window.begin(stream())
            return branch(*args)

        run.wrapped = branch  # type: ignore[attr-defined]
        return run


def _unwrapped(branch: Any) -> Any:
    """Return the branch under what open put around it."""
    while hasattr(branch, "wrapped"):
        branch = branch.wrapped
    return branch
