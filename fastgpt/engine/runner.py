"""Running one step on the device: forward, logits, sampling; one CUDA-graph replay per decode."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from fastgpt import _C, env
from fastgpt.batch import Batch
from fastgpt.engine.batch import Allocate, InputBuffers, StepInputs, allocate_with_torch
from fastgpt.engine.sampler import Sampler
from fastgpt.engine.scheduler import ScheduledRequest
from fastgpt.errors import DeviceError
from fastgpt.logging import get_logger
from fastgpt.ops.scratch import Scratch

__all__ = ["ForwardModel", "Runner", "graph_buckets", "measure_activation_bytes", "measure_scratch"]

_logger = get_logger(__name__)


class ForwardModel(Protocol):
    """The two calls that the runner makes on a model."""

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Return hidden states [num_tokens, hidden] and write the batch's keys and values."""

    def logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Return [n, vocab_size] fp32 for hidden rows [n, hidden]."""


def graph_buckets(max_batch: int) -> list[int]:
    """Return the decode batch sizes that get a CUDA graph, ascending, the last max_batch.

    >>> graph_buckets(20)
    [1, 2, 4, 8, 16, 20]
    """
    sizes = {1, 2, 4, *range(8, max_batch, 8), max_batch}
    return sorted(size for size in sizes if size <= max_batch)


@torch.inference_mode()
def measure_activation_bytes(
    model: ForwardModel, buffers: InputBuffers, kv_cache: torch.Tensor, num_tokens: int
) -> int:
    """Return the peak of what one step of num_tokens takes beside the pool, in bytes. GPU only.

    Args:
        kv_cache: any cache of the model's shape; nothing is written to it.
    """
    device = kv_cache.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = buffers.build_prefill_padding(num_tokens)
    model.logits(model.forward(inputs.batch, kv_cache)[: buffers.max_batch])
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


@torch.inference_mode()
def measure_scratch(
    model: ForwardModel, buffers: InputBuffers, kv_cache: torch.Tensor, max_batch: int
) -> Scratch:
    """Return a scratch that has measured a decode step of max_batch requests.

    Args:
        kv_cache: any cache of the model's shape; nothing is written to it.
    """
    scratch = Scratch(None)
    inputs = buffers.build_padding(max_batch)
    with scratch.step(), _overlap(not env.flag("FASTGPT_DISABLE_PDL")):
        model.logits(model.forward(inputs.batch, kv_cache))
    return scratch


@contextmanager
def _overlap(overlap: bool) -> Iterator[None]:
    """Let this thread's launches overlap, or not, within a `with` block."""
    _C.set_overlap_launches(overlap)
    try:
        yield
    finally:
        _C.set_overlap_launches(False)


class Runner:
    """Owns the device side of the loop. Only the engine's thread calls it.

    Args:
        model: what computes hidden states and logits.
        kv_cache: [num_blocks, *block_shape], the model's cache.
        buffers: the input buffers.
        sampler: the sampler.
        max_batch: most requests in a step.
        scratch: memory for the results of a decode step that is not a graph; None: new memory.

    Attributes:
        overlap_launches: whether the kernels of a decode step start while the ones before them
            run (compute capability 9.0 and newer). A captured graph keeps what held at its capture.
    """

    def __init__(
        self,
        model: ForwardModel,
        kv_cache: torch.Tensor,
        buffers: InputBuffers,
        sampler: Sampler,
        *,
        max_batch: int,
        scratch: Scratch | None = None,
        allocate: Allocate = allocate_with_torch,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.buffers = buffers
        self.sampler = sampler
        self._scratch = scratch
        self.busy_s = 0.0
        self.overlap_launches = not env.flag("FASTGPT_DISABLE_PDL")
        self._check_numerics = env.flag("FASTGPT_CHECK_NUMERICS")
        self._synchronize = env.flag("FASTGPT_SYNC")
        self._on_gpu = kv_cache.device.type == "cuda"
        device = kv_cache.device
        self._ids = allocate((max_batch,), torch.int64, "engine.chosen_ids").zero_()
        self._host_ids = torch.zeros(max_batch, dtype=torch.int64, pin_memory=self._on_gpu)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._buckets: list[int] = []
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            torch.cuda.synchronize(device)  # weights are in place: decode steps read them ahead

    @torch.inference_mode()
    def warm_up(self, max_batch: int, max_batch_tokens: int, iterations: int) -> None:
        """Run `iterations` empty decode steps per batch size and one empty prefill.

        The first request then pays no set-up. Nothing is written to the cache.
        """
        sizes = graph_buckets(max_batch) if self._on_gpu else [1, max_batch]
        for size in sizes:
            for _ in range(iterations):
                inputs = self.buffers.build_padding(size)
                with self._decode_scope(inputs):
                    self._compute(inputs)
        if self._on_gpu:
            self._compute(self.buffers.build_prefill_padding(max_batch_tokens))
        if self._on_gpu:
            torch.cuda.synchronize(self.kv_cache.device)

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int) -> None:
        """Capture one graph per batch bucket, with and without penalties. GPU only.

        FASTGPT_DISABLE_CUDA_GRAPH, FASTGPT_SYNC and FASTGPT_CHECK_NUMERICS leave them out.
        """
        if env.flag("FASTGPT_DISABLE_CUDA_GRAPH") or self._synchronize or self._check_numerics:
            _logger.info("decode runs without CUDA graphs, as a debug variable asks")
            return
        self._buckets = graph_buckets(max_batch)
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self._buckets):  # the largest first: smaller ones fit in its memory
            for has_penalties in (False, True):
                inputs = self.buffers.build_padding(bucket)
                inputs.has_penalties = has_penalties
                with self._decode_scope(inputs):
                    self._compute(inputs)
                    torch.cuda.synchronize(self.kv_cache.device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._compute(inputs)
                self._graphs[bucket, has_penalties] = graph

    def build_inputs(self, scheduled: list[ScheduledRequest]) -> StepInputs:
        """Return the step's inputs, padded to a graph's batch size when a graph can run them."""
        self.sampler.begin(scheduled)
        num_padded = 0
        if self._buckets and all(s.num_tokens == 1 and s.needs_sample for s in scheduled):
            num_padded = next(size for size in self._buckets if size >= len(scheduled))
        return self.buffers.build(scheduled, num_padded)

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> list[int]:
        """Compute the step and return the chosen ids of its num_samples rows.

        Raises:
            DeviceError: with FASTGPT_CHECK_NUMERICS, when a logit is NaN or infinite.
        """
        begin_s = time.perf_counter()
        graph = None
        if inputs.is_decode:
            graph = self._graphs.get((inputs.batch.num_reqs, inputs.has_penalties))
        if graph is not None:
            graph.replay()
        else:
            with self._decode_scope(inputs):
                self._compute(inputs)
        token_ids = self._fetch(inputs.num_samples)
        self.busy_s += time.perf_counter() - begin_s
        return token_ids

    @contextmanager
    def _decode_scope(self, inputs: StepInputs) -> Iterator[None]:
        """Let the kernels of a decode step overlap; weights are constants while one runs.

        A prefill's kernels are long, and it may follow the loading of weights. Its results are
        many; those of a decode step have their places.
        """
        scratch: AbstractContextManager[None] = nullcontext()
        if self._scratch is not None and inputs.is_decode:
            scratch = self._scratch.step()
        with _overlap(self.overlap_launches and inputs.is_decode), scratch:
            yield

    def _compute(self, inputs: StepInputs) -> None:
        hidden = self.model.forward(inputs.batch, self.kv_cache)
        num_rows = inputs.batch.logits_indices.shape[0]
        if num_rows == 0:
            return
        if num_rows != hidden.shape[0]:
            hidden = hidden.index_select(0, inputs.batch.logits_indices)
        logits = self.model.logits(hidden)
        if self._check_numerics and not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
            raise DeviceError(f"row {row} of {num_rows} has a NaN or infinite logit")
        self.sampler.sample(
            logits, inputs.sampling, has_penalties=inputs.has_penalties, out=self._ids[:num_rows]
        )
        if self._synchronize and self._on_gpu:
            torch.cuda.synchronize(self.kv_cache.device)

    def _fetch(self, num_samples: int) -> list[int]:
        if not self._on_gpu:
            return self._ids[:num_samples].tolist()
        if num_samples:
            self._host_ids[:num_samples].copy_(self._ids[:num_samples], non_blocking=True)
        self._copied.record()
        self._copied.synchronize()
        return self._host_ids[:num_samples].tolist()
