"""Allocation traces in the shape of LLM workloads, made from seeds.

A trace is an int64 array [num_ops, 4] of (is_allocation, id, bytes, stream); every id is allocated
once and freed at most once. Sizes are scaled so that the most bytes live at once are PEAK_BYTES.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PEAK_BYTES", "TRACES", "check", "make_trace", "peak_live_bytes"]

PEAK_BYTES = 9 << 30
MIB = 1 << 20


@dataclass
class _Recorder:
    """Collects the operations of a simulated program."""

    ops: list[tuple[int, int, int, int]] = field(default_factory=list)
    num_ids: int = 0
    stream: int = 0
    owner: dict[int, int] = field(default_factory=dict)  # id -> stream

    def allocate(self, num_bytes: float) -> int:
        self.num_ids += 1
        self.owner[self.num_ids] = self.stream
        self.ops.append((1, self.num_ids, max(1, int(num_bytes)), self.stream))
        return self.num_ids

    def free(self, *ids: int) -> None:
        for i in ids:
            self.ops.append((0, i, 0, self.owner[i]))


def concatenated_kv(rng: np.random.Generator, trace: _Recorder) -> None:
    """T1: every step each layer's K and V are joined with a row into a new tensor (HF's cache).

    Up to 12 sequences of 28 layers, K and V rows of 1 KiB before scaling.
    """
    layers, row, hidden, ffn = 28, 1024, 3584, 18944
    running: list[dict] = []
    for _ in range(170):
        if len(running) < 12 and rng.random() < 0.3:
            length = int(min(6000, rng.lognormal(6, 1))) + 1
            kv = []
            for _ in range(layers):
                x, q = trace.allocate(length * hidden * 2), trace.allocate(length * hidden * 2)
                kv += [trace.allocate(length * row), trace.allocate(length * row)]
                up, gate = trace.allocate(length * ffn * 2), trace.allocate(length * ffn * 2)
                trace.free(q, up)
                down = trace.allocate(length * hidden * 2)
                trace.free(gate, x, down)
            left = int(max(8, min(2000, rng.lognormal(5, 1))))
            running.append({"length": length, "left": left, "kv": kv})
        if not running:
            continue
        batch = len(running)
        logits = trace.allocate(batch * 152064 * 4)
        for layer in range(layers):
            x, up = trace.allocate(batch * hidden * 2), trace.allocate(batch * ffn * 2)
            for sequence in running:
                for j in (2 * layer, 2 * layer + 1):
                    longer = trace.allocate((sequence["length"] + 1) * row)
                    trace.free(sequence["kv"][j])
                    sequence["kv"][j] = longer
            trace.free(up, x)
        trace.free(logits)
        for sequence in running:
            sequence["length"] += 1
            sequence["left"] -= 1
            if sequence["left"] <= 0:
                trace.free(*sequence["kv"])
        running = [sequence for sequence in running if sequence["left"] > 0]


def continuous_batching(rng: np.random.Generator, trace: _Recorder, num_streams: int = 1) -> None:
    """T2: each request owns contiguous KV per layer; activations follow the tokens of a step.

    At most 48 requests of 28 layers, prefill in chunks of 2,048 tokens.
    """
    layers, row, hidden, ffn = 28, 1024, 3584, 18944
    running: list[tuple[int, list[int]]] = []
    for step in range(480):
        trace.stream = step % num_streams
        tokens = len(running)
        if len(running) < 48 and rng.random() < 0.5:
            length = int(min(16000, rng.lognormal(6.5, 1.1))) + 1
            generated = int(max(16, min(4000, rng.lognormal(5.5, 0.9))))
            total = -(-(length + generated) // 64) * 64
            kv = [trace.allocate(total * 2 * row) for _ in range(layers)]
            running.append((step + generated, kv))
            tokens += min(length, 2048)
        tokens = max(tokens, 1)
        for _ in range(layers):
            x = trace.allocate(tokens * hidden * 2)
            q = trace.allocate(tokens * (hidden + row) * 2)
            out = trace.allocate(tokens * hidden * 2)
            trace.free(q)
            up = trace.allocate(tokens * 2 * ffn * 2)
            gate = trace.allocate(tokens * ffn * 2)
            trace.free(up)
            down = trace.allocate(tokens * hidden * 2)
            trace.free(gate, out, x, down)
        logits = trace.allocate(max(1, len(running)) * 152064 * 4)
        trace.free(logits)
        for end, kv in running:
            if end <= step:
                trace.free(*kv)
        running = [(end, kv) for end, kv in running if end > step]


def four_streams(rng: np.random.Generator, trace: _Recorder) -> None:
    """T4: continuous batching whose steps take turns on four streams."""
    continuous_batching(rng, trace, num_streams=4)


def layer_swap(rng: np.random.Generator, trace: _Recorder) -> None:
    """T3: layers of three models in mixed precision pass through a window of 9 GiB."""
    models: list[list[list[int]]] = []
    for layers, hidden, ffn in ((28, 3584, 18944), (32, 4096, 14336), (48, 5120, 13824)):
        model = []
        for _ in range(layers):
            wide = rng.random() < 0.2
            bytes_each = 1.0 if wide else 4.125 / 8
            square = hidden * hidden
            model.append([
                square, square // 4, square // 4, int(square * bytes_each),
                int(hidden * ffn * bytes_each), int(hidden * ffn * bytes_each),
                int(hidden * ffn * (1.0 if wide else 0.56)),
            ])  # fmt: skip
        models.append(model)
    resident: deque[tuple[tuple[int, int], list[int], int]] = deque()
    used, current = 0, 0
    for step in range(6000):
        if step % 40 == 0:
            current = int(rng.integers(3))
        key = (current, int(rng.integers(len(models[current]))))
        if any(key == other for other, _, _ in resident):
            continue
        sizes = models[key[0]][key[1]]
        while used + sum(sizes) > 9 << 30:
            _, ids, num_bytes = resident.popleft()
            trace.free(*ids)
            used -= num_bytes
        resident.append((key, [trace.allocate(size) for size in sizes], sum(sizes)))
        used += sum(sizes)
        trace.free(trace.allocate((1 + int(rng.integers(64))) * MIB))


TRACES: dict[str, Callable[[np.random.Generator, _Recorder], None]] = {
    "T1 concatenated KV": concatenated_kv,
    "T2 continuous batching": continuous_batching,
    "T3 layer swap": layer_swap,
    "T4 four streams": four_streams,
}


def peak_live_bytes(trace: np.ndarray) -> int:
    """Return the most bytes that are live at once."""
    sizes = np.zeros(int(trace[:, 1].max()) + 1, dtype=np.int64)
    allocations = trace[trace[:, 0] == 1]
    sizes[allocations[:, 1]] = allocations[:, 2]
    change = np.where(trace[:, 0] == 1, sizes[trace[:, 1]], -sizes[trace[:, 1]])
    return int(np.cumsum(change).max())


def make_trace(name: str, seed: int) -> np.ndarray:
    """Return one trace, scaled to PEAK_BYTES."""
    recorder = _Recorder()
    TRACES[name](np.random.default_rng(seed), recorder)
    trace = np.array(recorder.ops, dtype=np.int64)
    scale = PEAK_BYTES / peak_live_bytes(trace)
    trace[:, 2] = np.maximum(1, (trace[:, 2] * scale).astype(np.int64)) * (trace[:, 0] == 1)
    return trace


def check(trace: np.ndarray) -> None:
    """Raise AssertionError unless every id is allocated once and freed at most once, later."""
    live: set[int] = set()
    seen: set[int] = set()
    for is_allocation, i, num_bytes, _ in trace.tolist():
        if is_allocation:
            assert i not in seen
            assert num_bytes > 0
            seen.add(i)
            live.add(i)
        else:
            live.remove(i)
