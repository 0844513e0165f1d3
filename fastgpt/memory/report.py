"""What a pool says of itself: byte counts, entries, and its layout in torch's form."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["PoolEntry", "PoolStats", "torch_snapshot"]

# (address, bytes, [(address, bytes, requested bytes, state)]) of a run of physical memory.
Segment = tuple[int, int, list[tuple[int, int, int, str]]]


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Byte counts of a pool, exact at every moment.

    reserved = requested + rounding + pending + returnable + scattered + lane + evicted.

    Attributes:
        budget_bytes: reserved never exceeds it.
        reserved_bytes: physical memory held.
        allocated_bytes: handed out, requested + rounding.
        requested_bytes: handed out, as asked for.
        rounding_bytes: handed out beyond what was asked for.
        pending_bytes: free, a stream may still be using it.
        returnable_bytes: free, in handles that hold nothing else.
        scattered_bytes: free, in handles that are partly used.
        lane_bytes: free, kept aside for one thread and stream.
        evicted_bytes: under evicted entries, in handles that are partly used.
        ahead_bytes: of the free bytes, those never handed out yet.
        largest_free_bytes: the largest request served without growing.
        peak_requested_bytes, peak_allocated_bytes, peak_reserved_bytes: since reset_peaks.
        peak_touched_bytes: peak of reserved - ahead.
        num_slabs: handles of physical memory, or fixed slabs.
        num_blocks: live blocks; num_allocations: ever.
        num_upstream_calls: driver calls for memory.
        num_stream_waits, num_event_records: for reuse on another stream.
        host_bytes: host memory that holds evicted and frozen entries.
        num_evictions, num_clean_evictions: ever; clean ones copied nothing.
        num_restores: ever.
        fragmentation: 1 - peak requested / peak reserved.
        fragmentation_now: (rounding + scattered) / reserved.
    """

    budget_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int
    rounding_bytes: int
    pending_bytes: int
    returnable_bytes: int
    scattered_bytes: int
    lane_bytes: int
    evicted_bytes: int
    ahead_bytes: int
    largest_free_bytes: int
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_touched_bytes: int
    num_slabs: int
    num_blocks: int
    num_allocations: int
    num_upstream_calls: int
    num_stream_waits: int
    num_event_records: int
    host_bytes: int
    num_evictions: int
    num_clean_evictions: int
    num_restores: int
    fragmentation: float
    fragmentation_now: float

    @property
    def free_bytes(self) -> int:
        """Reserved and not handed out."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True)
class PoolEntry:
    """One named buffer: its size, how many tensors hold it, and whether it is in host memory."""

    name: str
    num_bytes: int
    num_leases: int
    is_evicted: bool


def torch_snapshot(layout: Iterable[Segment], index: int) -> dict[str, Any]:
    """Return a pool's layout in the form of torch.cuda.memory._snapshot.

    Args:
        layout: its segments.
        index: of its device.
    """
    states = {"live": "active_allocated", "pending": "active_pending_free"}
    segments = []
    for address, num_bytes, blocks in layout:
        live = [block for block in blocks if block[3] == "live"]
        segments.append(
            {
                "device": index,
                "address": address,
                "total_size": num_bytes,
                "allocated_size": sum(block[1] for block in live),
                "active_size": sum(b[1] for b in blocks if b[3] in states),
                "requested_size": sum(block[2] for block in live),
                "stream": 0,
                "segment_type": "large",
                "segment_pool_id": (0, 0),
                "is_expandable": True,
                "frames": [],
                "blocks": [
                    {
                        "address": block_address,
                        "size": size,
                        "requested_size": requested,
                        "state": states.get(state, "inactive"),
                        "frames": [],
                    }
                    for block_address, size, requested, state in blocks
                ],
            }
        )
    return {
        "segments": segments,
        "device_traces": [[] for _ in range(index + 1)],
        "allocator_settings": {},
    }
