"""The engine: requests in, tokens out, one step after another."""

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt import _C
from fastgpt.config import check_int, check_kv_cache_dtype
from fastgpt.engine.batch import InputBuffers
from fastgpt.engine.block_manager import BlockManager, num_blocks_for
from fastgpt.engine.cache import plan_num_blocks
from fastgpt.engine.loading import EngineModel, LoadedModel, load_model
from fastgpt.engine.prompts import Prompt, as_prompts, encode
from fastgpt.engine.runner import Runner, measure_activation_bytes, measure_scratch
from fastgpt.engine.sampler import Sampler
from fastgpt.engine.scheduler import Scheduler
from fastgpt.engine.text_stream import StepOutput, StreamPiece, TextStream
from fastgpt.errors import ConfigError, RequestError
from fastgpt.logging import get_logger
from fastgpt.ops.scratch import Scratch
from fastgpt.request import (
    Limits,
    Request,
    RequestOutput,
    SamplingParams,
    check_request,
)
from fastgpt.tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats", "StepOutput", "StreamPiece"]

_logger = get_logger(__name__)

# What CUDA graphs and cuBLAS-like libraries take from the driver beside the pool.
_GRAPH_RESERVE_BYTES = 256 << 20


@dataclass(frozen=True)
class EngineStats:
    """The engine's figures at one moment; counters run from the start.

    Attributes:
        num_running, num_waiting: requests.
        num_blocks, num_free_blocks: KV blocks of block_size tokens.
        num_preemptions, num_steps, num_prompt_tokens, num_generated_tokens: counters.
        busy_s: seconds in which a step was being computed.
        pool: the memory pool's figures.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    busy_s: float
    pool: dict[str, Any]


class Engine:
    """Serves one model in this process.

    `add_request`, `abort` and `stats` may be called from any thread; steps run one at a time.

    Args:
        model: a container, a Hugging Face directory, a GGUF file, an open Checkpoint, or a Model.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16, of activations and cache.
        kv_cache_dtype: auto (dtype), fp8 or int8: codes of a byte with a scale per token and head.
        memory_pool_size: cap of the memory taken: bytes, "24GB", "0.9" (of what is free), "-2GiB".
        swap_to_cpu: weights that memory_pool_size has no room for wait in host memory and are
            copied to the device in every step.
        max_batch: most requests running together.
        max_length: most tokens of one request; lowered to what the model was made for.
        block_size: tokens of a KV block, 16 to 128.
        max_batch_tokens: most tokens in one step; None: 512 on the CPU, 4096 on a GPU.
        min_batch, batch_timeout_s: see Scheduler.
        num_blocks: KV blocks; None: what memory_pool_size leaves, up to max_batch * max_length.
        warmup_iterations: empty steps of each batch size before the first request.
        tokenizer: a Tokenizer or a directory; None: the checkpoint's.

    Raises:
        ConfigError, CheckpointError, OutOfMemory: at construction, when the model cannot be served.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache_dtype: str = "auto",
        memory_pool_size: str | int | None = None,
        swap_to_cpu: bool = False,
        max_batch: int = 32,
        max_length: int = 2048,
        block_size: int = 32,
        max_batch_tokens: int | None = None,
        min_batch: int = 1,
        batch_timeout_s: float = 0.1,
        num_blocks: int | None = None,
        warmup_iterations: int = 1,
        tokenizer: Tokenizer | str | Path | None = None,
    ) -> None:
        check_int("max_batch", max_batch, 1, 1024)
        check_int("max_length", max_length, 2, 2**31 - 1)
        check_int("block_size", block_size, 16, 128)
        if max_batch_tokens is not None:
            check_int("max_batch_tokens", max_batch_tokens, 1, 2**20)
        check_int("min_batch", min_batch, 1, max_batch, "max_batch")
        if not batch_timeout_s >= 0:
            raise ConfigError(f"batch_timeout_s is {batch_timeout_s}; expected 0 or more")
        if num_blocks is not None:
            check_int("num_blocks", num_blocks, 1, 2**31 - 1)
        check_int("warmup_iterations", warmup_iterations, 0, 1000)
        check_kv_cache_dtype("kv_cache_dtype", kv_cache_dtype)
        self.loaded: LoadedModel = load_model(
            model,
            device=device,
            dtype=dtype,
            memory_pool_size=memory_pool_size,
            swap_to_cpu=swap_to_cpu,
            max_length=max_length,
            tokenizer=tokenizer,
        )
        served: EngineModel = self.loaded.model
        served.use_kv_cache_dtype(kv_cache_dtype)
        self.kv_cache_dtype = kv_cache_dtype
        self.tokenizer = self.loaded.tokenizer
        self.device = self.loaded.device
        self.max_batch = max_batch
        self.max_length = max_length
        if max_length > served.max_position:
            _logger.warning(
                "max_length %d lowered to the model's %d positions", max_length, served.max_position
            )
            self.max_length = served.max_position
        if max_batch_tokens is None:
            max_batch_tokens = 512 if self.device.type == "cpu" else 4096
        max_batch_tokens = max(max_batch_tokens, max_batch)
        served.reserve_workspace(max_batch_tokens, self.max_length)

        memory = self.loaded.memory
        buffers = InputBuffers(
            self.device,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            max_blocks=num_blocks_for(self.max_length, block_size),
            block_size=block_size,
            max_length=self.max_length,
            allocate=memory.allocate,
        )
        history = memory.allocate(
            (max_batch, served.vocab_size), torch.int32, "engine.token_history"
        ).zero_()
        block_shape = tuple(served.kv_layout.block_shape(block_size))
        storage_dtype = served.kv_layout.storage_dtype(served.dtype)
        beside_bytes, scratch = self._measure_step(served, buffers, block_shape, max_batch_tokens)
        if num_blocks is None:
            block_bytes = storage_dtype.itemsize
            for size in block_shape:
                block_bytes *= size
            one_request_bytes = num_blocks_for(self.max_length, block_size) * block_bytes
            left_bytes = memory.left_bytes(one_request_bytes + beside_bytes) - beside_bytes
            num_blocks = plan_num_blocks(
                left_bytes=left_bytes,
                block_bytes=block_bytes,
                max_batch=max_batch,
                max_length=self.max_length,
                block_size=block_size,
            )
        kv_cache = memory.allocate((num_blocks, *block_shape), storage_dtype, "engine.kv_cache")
        kv_cache.zero_()
        swap = memory.swap
        if swap is not None:
            swap.open(served, beside_bytes)
            swap.log()
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            min_batch=min_batch,
            batch_timeout_s=batch_timeout_s,
        )
        self.runner = Runner(
            served,
            kv_cache,
            buffers,
            Sampler(history),
            max_batch=max_batch,
            scratch=scratch,
            allocate=memory.allocate,
        )
        if swap is not None and swap.bytes_per_pass:
            # A kernel that starts before its predecessor ends reads its weights at once: they may
            # still be on their way.
            self.runner.overlap_launches = False
        self.limits = Limits(served.vocab_size, self.max_length, num_blocks * block_size)

        self._inbox: deque[tuple[Literal["add"], Request] | tuple[Literal["abort"], str]] = deque()
        # Every unfinished request, those in the inbox too, and who waits for its outputs.
        self._sinks: dict[str, Callable[[StepOutput], None] | None] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._ids_lock = threading.Lock()  # of the keys of _sinks
        self._pump: asyncio.Task[None] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self.kernels = self._describe_kernels()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        begin_s = time.monotonic()
        if warmup_iterations:
            self.runner.warm_up(max_batch, max_batch_tokens, warmup_iterations)
        if self.device.type == "cuda":
            self.runner.capture_graphs(max_batch)
        self.warm_up_s = time.monotonic() - begin_s

    def _measure_step(
        self,
        served: EngineModel,
        buffers: InputBuffers,
        block_shape: tuple[int, ...],
        max_batch_tokens: int,
    ) -> tuple[int, Scratch | None]:
        """Return what a step takes beside the pool, and the memory for a decode step's results.

        On a GPU decode steps are graphs, with memory of their own; on the CPU it is the pool's.
        """
        memory, swap = self.loaded.memory, self.loaded.memory.swap
        dtype = served.kv_layout.storage_dtype(served.dtype)
        probe = memory.allocate((1, *block_shape), dtype, "engine.kv_probe").zero_()
        if swap is not None:
            swap.open(served)
        beside_bytes = 0
        measured = None
        if self.device.type == "cuda":
            beside_bytes = _GRAPH_RESERVE_BYTES + measure_activation_bytes(
                served, buffers, probe, max_batch_tokens
            )
        else:
            measured = measure_scratch(served, buffers, probe, self.max_batch)
        if swap is not None:
            swap.close()
        del probe
        memory.pool.free("engine.kv_probe")
        if measured is None or measured.num_bytes == 0:
            return beside_bytes, None
        results = memory.allocate((measured.num_bytes,), torch.uint8, "engine.decode_results")
        return beside_bytes, measured.plan(results)

    # -- requests -----------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_output: Callable[[StepOutput], None] | None = None,
    ) -> str:
        """Queue a request and return its id; the next step sees it.

        Args:
            prompt: a text, token ids, or chat messages ({"role": …, "content": …}).
            params: None: the checkpoint's defaults.
            request_id: None: a new one.
            on_output: called from the stepping thread with each StepOutput of the request.

        Raises:
            RequestError: if the request is invalid or can never fit.
        """
        token_ids = self.encode(prompt)
        resolved = (params or SamplingParams()).resolve(self.loaded.generation_config)
        max_new_tokens = check_request(token_ids, resolved, self.limits)
        stop_ids = frozenset(resolved.stop_token_ids)
        if not resolved.ignore_eos:
            stop_ids |= self.loaded.eos_ids
        seed = resolved.seed if resolved.seed is not None else secrets.randbits(63)
        with self._ids_lock:
            if request_id is None:
                names = (f"request-{number}" for number in self._ids)
                request_id = next(name for name in names if name not in self._sinks)
            elif request_id in self._sinks:
                raise RequestError(f"request_id {request_id!r} is in use; choose another")
            self._sinks[request_id] = on_output
        request = Request(request_id, token_ids, resolved, max_new_tokens, seed, stop_ids)
        self._inbox.append(("add", request))
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free before the next step. Unknown ids are ignored."""
        self._inbox.append(("abort", request_id))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, with exactly one BOS where the model uses one.

        Raises:
            RequestError: if it is none of these, if it is text and there is no tokenizer, or if the
                chat template refuses it.
        """
        return encode(prompt, self.tokenizer, self.limits.max_length - 1)

    def find_request(self, request_id: str) -> Request | None:
        """Return an unfinished request the scheduler has seen."""
        return self.scheduler.find(request_id)

    # -- the loop -----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._inbox) or self.scheduler.has_work

    def step(self) -> list[StepOutput]:
        """Run one step for all requests together; return what each of them got."""
        with self._lock:
            ended = self._take_inbox()
            scheduled = self.scheduler.schedule()
            inputs = self.runner.build_inputs(scheduled) if scheduled else None
            token_ids = self.runner.run(inputs) if inputs else []
            sampled = self.scheduler.complete(scheduled, token_ids)
            return self._publish(ended, sampled)

    def _take_inbox(self) -> list[StepOutput]:
        """Admit new requests to the queue and drop aborted ones."""
        ended = []
        while self._inbox:
            message = self._inbox.popleft()
            if message[0] == "add":
                self.scheduler.add(message[1])
                self._num_prompt_tokens += len(message[1].prompt_token_ids)
            elif (request := self.scheduler.abort(message[1])) is not None:
                ended.append(StepOutput(request.request_id, [], "abort", request.timings()))
        return ended

    def _publish(self, ended: list[StepOutput], sampled: list[Request]) -> list[StepOutput]:
        """Turn the step's result into outputs and hand them to those who wait."""
        self._num_steps += 1
        self._num_generated_tokens += len(sampled)
        outputs = ended + [
            StepOutput(r.request_id, r.token_ids[-1:], r.finish_reason, r.timings())
            if r.finish_reason
            else StepOutput(r.request_id, r.token_ids[-1:])
            for r in sampled
        ]
        self._hand_out(outputs)
        return outputs

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        """Give outputs to those who wait; one who fails keeps no other from its own."""
        failure: Exception | None = None
        for output in outputs:
            if output.finish_reason:
                sink = self._sinks.pop(output.request_id)
            else:
                sink = self._sinks[output.request_id]
            if sink is None:
                continue
            try:
                sink(output)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    # -- convenience --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts and return their outputs in order; runs the steps itself.

        Args:
            prompts: one prompt or several; each a text, token ids, or chat messages.
            params: for all prompts, or one for each.

        Raises:
            RequestError: if a prompt is invalid; then none is run.
        """
        several = as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(several)
        if wrong := [one for one in each if not isinstance(one, SamplingParams | None)]:
            raise RequestError(f"params hold {wrong[0]!r}; expected SamplingParams or None")
        if len(each) != len(several):
            raise RequestError(f"{len(several)} prompts and {len(each)} params; expected as many")
        token_ids = [self.encode(prompt) for prompt in several]
        for ids, one in zip(token_ids, each, strict=True):
            check_request(ids, one or SamplingParams(), self.limits)
        streams = [TextStream(self, ids, one) for ids, one in zip(token_ids, each, strict=True)]
        try:
            while not all(stream.finish_reason for stream in streams):
                self.step()
        finally:
            for stream in streams:
                if not stream.finish_reason:
                    self.abort(stream.request_id)
            with self._lock:  # a stop string's abort frees its blocks now, not at the next step
                self._hand_out(self._take_inbox())
        return [stream.output() for stream in streams]

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[StreamPiece]:
        """Yield an answer in pieces of whole characters; leaving the loop aborts the request.

        Steps run in a thread of the engine while any stream is open, so the event loop stays free.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[StreamPiece] = asyncio.Queue()

        def put(piece: StreamPiece) -> None:
            # Who left the stream may have closed its loop before the engine saw that.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        stream = TextStream(
            self,
            self.encode(prompt),
            params,
            on_piece=put,
        )
        try:
            while True:
                self._ensure_pump(loop)
                getter = asyncio.ensure_future(pieces.get())
                pump = self._pump
                assert pump is not None
                await asyncio.wait({getter, pump}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    pump.result()  # raises what stopped the engine
                    continue
                piece = getter.result()
                if piece.text or piece.finish_reason or self.tokenizer is None:
                    yield piece
                if piece.finish_reason:
                    return
        finally:
            if not stream.finish_reason:
                self.abort(stream.request_id)

    def stats(self) -> EngineStats:
        """Return the engine's figures."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._inbox),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            block_size=self.blocks.block_size,
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            busy_s=self.runner.busy_s,
            pool=self.loaded.memory.stats(),
        )

    def _describe_kernels(self) -> str:
        """Return which kernels compute: the CPU's instruction set or the GPU's architecture."""
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"cuda sm_{major}{minor}"
        return f"cpu {_C.cpu_isa()}"

    def _ensure_pump(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pump is not None and not self._pump.done() and self._pump.get_loop() is loop:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastgpt-engine")
        self._pump = loop.create_task(self._run_steps(loop, self._executor))

    async def _run_steps(
        self, loop: asyncio.AbstractEventLoop, executor: ThreadPoolExecutor
    ) -> None:
        def run_for_a_while() -> None:
            end_s = time.monotonic() + 0.05
            while self.has_work and time.monotonic() < end_s:
                self.step()

        while self.has_work:
            await loop.run_in_executor(executor, run_for_a_while)
