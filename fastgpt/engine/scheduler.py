"""Which requests run in the next step, and for how many tokens. No tensors here.

Continuous batching: each step takes one token of every decoding request and, with what is left of
the token budget, the next chunk of prompts. When blocks run out the youngest request gives its own
back and is computed again later. Sources: Orca (OSDI 2022), PagedAttention (arXiv:2309.06180),
Sarathi-Serve (arXiv:2403.02310).
"""

import time
from collections import deque
from dataclasses import dataclass

from fastgpt.engine.block_manager import BlockManager
from fastgpt.request import FinishReason, Request

__all__ = ["ScheduledRequest", "Scheduler"]


@dataclass(slots=True)
class ScheduledRequest:
    """A request's part of one step: its tokens num_cached_tokens .. + num_tokens - 1."""

    request: Request
    num_tokens: int

    @property
    def needs_sample(self) -> bool:
        """Whether this step reaches the request's last token, so that the next one is chosen."""
        request = self.request
        return request.num_cached_tokens + self.num_tokens == len(request.token_ids)


class Scheduler:
    """Owns all unfinished requests. Only the engine's thread calls it.

    Args:
        blocks: the KV blocks.
        max_batch: most requests running together.
        max_batch_tokens: most tokens in one step.
        min_batch: while requests run, waiting ones are admitted only when this many wait ...
        batch_timeout_s: ... or the oldest has waited this long. An idle engine admits at once.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch: int,
        max_batch_tokens: int,
        min_batch: int = 1,
        batch_timeout_s: float = 0.1,
    ) -> None:
        self.blocks = blocks
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.min_batch = min_batch
        self.batch_timeout_s = batch_timeout_s
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: list[Request] = []  # in order of arrival
        self.num_preemptions = 0
        self._requests: dict[str, Request] = {}
        self._free_slots = list(range(max_batch - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def find(self, request_id: str) -> Request | None:
        """Return an unfinished request."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue."""
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Forget a request and free its blocks at once; None if it is unknown or finished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request, "abort")
        return request

    def requests(self) -> list[Request]:
        """Return all unfinished requests."""
        return list(self._requests.values())

    def schedule(self, now_s: float | None = None) -> list[ScheduledRequest]:
        """Choose the next step's requests, with blocks for all their tokens.

        Decodes come first, so a long prompt never delays them by more than one chunk.

        Args:
            now_s: time.monotonic(), for batch_timeout.
        """
        now_s = time.monotonic() if now_s is None else now_s
        decodes: list[ScheduledRequest] = []
        budget = self.max_batch_tokens
        for request in list(self.running):
            if request.num_cached_tokens < request.num_tokens - 1 or not request.block_table:
                continue  # still in prefill, or preempted by an older one a moment ago
            if self._make_room(request, request.num_tokens):
                decodes.append(ScheduledRequest(request, 1))
                budget -= 1
        # Making room for an older request may have preempted a younger one chosen above.
        decodes = [s for s in decodes if s.request.block_table]

        prefills = [r for r in self.running if r.num_cached_tokens < r.num_tokens - 1]
        chunks: list[ScheduledRequest] = []
        for request in prefills:
            if budget == 0:
                break
            budget -= self._take_chunk(request, budget, chunks)
        for request in self._admit(now_s):
            budget -= self._take_chunk(request, budget, chunks) if budget else 0
        scheduled = decodes + chunks
        for item in scheduled:
            if item.request.first_scheduled_s is None:
                item.request.first_scheduled_s = now_s
        return scheduled

    def complete(
        self, scheduled: list[ScheduledRequest], token_ids: list[int], now_s: float | None = None
    ) -> list[Request]:
        """Record one step's result; return the requests that got a token, finished ones freed.

        Args:
            scheduled: what `schedule` returned.
            token_ids: one id for each scheduled request with needs_sample, in order.
        """
        now_s = time.monotonic() if now_s is None else now_s
        sampled: list[Request] = []
        ids = iter(token_ids)
        for item in scheduled:
            request = item.request
            needs_sample = item.needs_sample
            request.num_cached_tokens += item.num_tokens
            if not needs_sample:
                continue
            token_id = next(ids)
            request.token_ids.append(token_id)
            request.last_token_s = now_s
            if request.first_token_s is None:
                request.first_token_s = now_s
            sampled.append(request)
            if token_id in request.stop_token_ids:
                self._finish(request, "stop")
            elif request.num_generated >= request.max_new_tokens:
                self._finish(request, "length")
        return sampled

    def _take_chunk(self, request: Request, budget: int, chunks: list[ScheduledRequest]) -> int:
        num_tokens = min(budget, request.num_tokens - request.num_cached_tokens)
        chunks.append(ScheduledRequest(request, num_tokens))
        return num_tokens

    def _admit(self, now_s: float) -> list[Request]:
        """Move waiting requests to running, each with blocks for its whole prompt."""
        if not self.waiting:
            return []
        room = self.max_batch - len(self.running)
        if self.running:
            waited_s = now_s - self.waiting[0].arrival_s
            enough = len(self.waiting) >= min(self.min_batch, max(room, 1))
            if not enough and waited_s < self.batch_timeout_s:
                return []
        admitted: list[Request] = []
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            # One block in reserve for each running request: admitting must not preempt at once.
            needed = self.blocks.missing(request, request.num_tokens)
            if needed + len(self.running) > self.blocks.num_free:
                break
            self.blocks.grow(request, request.num_tokens)
            self.waiting.popleft()
            request.sampler_slot = self._free_slots.pop()
            self._insert_by_arrival(self.running, request)
            admitted.append(request)
        return admitted

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Grow the request's table, preempting younger requests; False if it preempted itself."""
        while self.blocks.missing(request, num_tokens) > self.blocks.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        self.blocks.grow(request, num_tokens)
        return True

    def _preempt(self, request: Request) -> None:
        """Give back a running request's blocks; it is computed again from its first token."""
        self._release(request)
        request.num_cached_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._insert_by_arrival(self.waiting, request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self._requests[request.request_id]
        if request.sampler_slot >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.free(request)
        self._free_slots.append(request.sampler_slot)
        request.sampler_slot = -1

    @staticmethod
    def _insert_by_arrival(queue: list[Request] | deque[Request], request: Request) -> None:
        index = len(queue)
        while index and queue[index - 1].arrival_s > request.arrival_s:
            index -= 1
        queue.insert(index, request)
