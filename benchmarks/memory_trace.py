"""What would this service's use of memory cost in the pool? Replays a trace of GPTMemoryPool.trace.

    python benchmarks/memory_trace.py trace.jsonl [--device cpu] [--budget 8GiB]

Checks that the trace is whole (no block is live twice), repeats its allocations, frees, growth and
evictions in order on one stream, and prints peak live and committed bytes and the time of an
operation. Threads and other streams are counted, not repeated. Ends with one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.memory import GPTMemoryPool


@dataclass(frozen=True)
class Event:
    """One line of a trace; csrc/include/fastgpt/trace.h says what its fields mean."""

    t_us: float
    op: str
    id: int
    bytes: int
    stream: int
    thread: int
    name: str


def read_trace(path: str | Path) -> Iterator[Event]:
    """Yield the events of a trace file.

    Raises:
        ValueError: for a line that is no event, with its number.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Event(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not an event of a trace: {error}") from error


def blocks(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events that move memory, and check that the trace is whole.

    A free of what is not live is dropped: the pool refused it. Blocks from before the trace are
    unknown, and so is what happens to them.

    Raises:
        ValueError: if a block is allocated that is live.
    """
    live: set[int] = set()
    for event in events:
        if event.op == "allocate":
            if event.id in live:
                raise ValueError(f"block {event.id} is allocated twice at {event.t_us} us")
            live.add(event.id)
        elif event.op not in {"free", "grow", "evict", "restore"} or event.id not in live:
            continue
        if event.op == "free":
            live.discard(event.id)
        yield event


def replay(events: Iterable[Event], pool: GPTMemoryPool) -> dict[str, Any]:
    """Repeat a trace's use of memory in a pool; return counts, peaks in bytes and times in us.

    A block that grows or is evicted at some time gets a name, so that the pool can do the same.
    """
    moves = list(blocks(events))
    named = {event.id for event in moves if event.op in {"grow", "evict", "restore"}}
    held: dict[int, torch.Tensor] = {}
    times: list[float] = []
    pool.reset_peaks()
    for event in moves:
        name = f"trace.{event.id}"
        begin = time.perf_counter()
        if event.op in {"allocate", "grow"}:
            if event.id in named:
                pool.allocate((event.bytes,), name, torch.uint8, "keep")
            else:
                held[event.id] = pool.allocate((event.bytes,), dtype=torch.uint8)
        elif event.op == "free":
            if event.id in named:
                pool.free(name)
            else:
                del held[event.id]
        elif event.op == "evict":
            pool.evict(name)
        else:
            pool.restore(name)
        times.append((time.perf_counter() - begin) * 1e6)
    stats = pool.stats()
    pool.check_integrity()
    return {
        "num_events": len(moves),
        "peak_live_bytes": stats.peak_requested_bytes,
        "peak_committed_bytes": stats.peak_reserved_bytes,
        "utilisation": 1 - stats.fragmentation,
        "event_us_p50": statistics.median(times) if times else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", default=None)
    parser.add_argument("--host-budget", default=None)
    arguments = parser.parse_args()
    events = list(read_trace(arguments.trace))
    pool = GPTMemoryPool(arguments.device, arguments.budget, host_budget=arguments.host_budget)
    result = replay(events, pool)
    result["num_streams"] = len({event.stream for event in events})
    result["num_threads"] = len({event.thread for event in events})
    for key, value in result.items():
        print(f"{key:22}{value:,.3f}" if isinstance(value, float) else f"{key:22}{value:,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
