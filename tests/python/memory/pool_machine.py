"""A model of the memory pool, as a hypothesis state machine over the fake device.

The model holds what a user may rely on: which addresses are taken (an interval map), which bytes
each buffer holds (stamps), and which stream has seen them. It orders its own work as a user must,
and never more: what the pool has to wait for, the pool has to wait for. After each step the pool's
counts must equal the model's, and the device must have seen no race, no use of memory that is not
mapped and no byte above the budget. Any driver call may fail; then nothing may have changed.

The numbers I1 to I12 name the pool's invariants:
    I1 live extents are disjoint · I2 aligned to 256 and mapped · I3 an address never changes ·
    I4 the budget holds · I5 reuse on another stream waits · I6 memory is mapped once and unmapped
    only when nobody uses it · I7 free neighbours are merged · I8 evict and restore give the same
    bytes · I9 what is pinned or held never moves · I10 a failed driver call changes nothing ·
    I11 memory outlives the pool while somebody holds it · I12 the byte counts add up
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fastgpt import _C
from fastgpt.errors import DeviceError, InvalidArgument, OutOfMemory

PAGE = 4096
BUDGET = 40 * PAGE
HOST = 24 * PAGE
ALIGNMENT = 256
UNDEFINED, ZERO, KEEP = 0, 1, 2

Failure = tuple[int, int, bool]  # the k-th driver call from now, how many, throws or refuses
Content = list[tuple[int, int | None]]  # runs of bytes that hold one stamp; None = anything

NAMES = ["a", "b", "c", "d", "e"]
NO_FAILURE = 70  # of 100
FAILURES: list[Failure] = [
    *((k, 1, throws) for k in range(1, 12) for throws in (False, True)),
    *((k, 1000, throws) for k in (1, 2, 3, 5) for throws in (False, True)),
]
sizes = st.sampled_from([0, 1, 255, 256, 1000, 4096, 5000, 9000, 16384, 33000, 60000])
layouts = st.sampled_from(["u8", "f16"])
picks = st.integers(0, 59)  # modulo what there is to pick from
failures = st.integers(0, 99).map(lambda i: None if i < NO_FAILURE else FAILURES[i - NO_FAILURE])


@dataclass(eq=False)
class Memory:
    """One live extent."""

    data: int
    num_bytes: int
    content: Content
    writer: int | None  # the stream whose work the bytes come from; None = the host knows them
    readers: set[int] = field(default_factory=set)  # streams that read them since

    @property
    def end(self) -> int:
        return self.data + -(-max(self.num_bytes, 1) // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class Entry:
    """One name."""

    memory: Memory
    layout: str
    num_pins: int = 0
    num_held: int = 0
    is_frozen: bool = False
    is_scheduled: bool = False


@dataclass(eq=False)
class Held:
    """One lease. `stream` is where its buffer is used without further notice."""

    lease: Any
    memory: Memory
    stream: int


def cut(content: Content, num_bytes: int) -> Content:
    """Return the first bytes of a content, then zeros."""
    kept: Content = []
    for length, stamp in content:
        if num_bytes > 0 and length > 0:
            kept.append((min(length, num_bytes), stamp))
            num_bytes -= kept[-1][0]
    return kept + ([(num_bytes, 0)] if num_bytes > 0 else [])


class PoolMachine(RuleBasedStateMachine):
    num_steps = 0  # of all machines; a test asserts that it did its share

    @initialize(seed=st.integers(0, 2**16), evicts=st.booleans(), lanes=st.booleans())
    def make_device(self, seed: int, evicts: bool, lanes: bool) -> None:
        self.device = _C.FakeDevice(
            budget_bytes=BUDGET,
            host_bytes=HOST,
            granularity=PAGE,
            handle_bytes=4 * PAGE,
            chunk_bytes=7000,
            evict_when_full=evicts,
            use_lanes=lanes,
            seed=seed,
        )
        self.streams = [self.device.create_stream() for _ in range(3)]
        self.captured: set[int] = set()
        self.entries: dict[str, Entry] = {}
        self.held: list[Held] = []
        self.blocks: list[Memory] = []
        self.evicted_blocks: list[Memory] = []
        self.taken: list[tuple[int, int]] = []  # sorted: the interval map
        self.stamp = 0
        self.is_made = True
        for name in NAMES[:3]:
            self.renew(name, 9000, "u8", UNDEFINED, self.streams[0], None, keeps=False)

    # -- what the model knows ---------------------------------------------------------------------

    def name(self, pick: int) -> str:
        """One of the entries, or now and then a name that has none."""
        known = sorted(self.entries)
        return known[pick % len(known)] if known and pick < 57 else NAMES[pick % 5]

    def stream(self, pick: int) -> int:
        return self.streams[pick % len(self.streams)]

    def evicted(self) -> set[str]:
        return {name for name, _, _, is_evicted in self.device.entries() if is_evicted}

    def num_leases(self, memory: Memory) -> int:
        return sum(held.memory is memory for held in self.held)

    def live(self, evicted: set[str]) -> list[Memory]:
        """Every extent that has physical memory."""
        gone = [self.entries[name].memory for name in evicted]
        some = [entry.memory for entry in self.entries.values()]
        some += [held.memory for held in self.held] + self.blocks
        return [m for m in {id(m): m for m in some}.values() if all(m is not g for g in gone)]

    def take(self, memory: Memory) -> None:
        begin, end = memory.data, memory.end
        assert begin % ALIGNMENT == 0  # I2
        assert self.device.is_mapped(begin, end - begin)  # I2
        at = bisect_left(self.taken, (begin, end))
        assert at == 0 or self.taken[at - 1][1] <= begin, "overlaps the extent before"  # I1
        assert at == len(self.taken) or end <= self.taken[at][0], "overlaps the next extent"  # I1
        insort(self.taken, (begin, end))

    def untake(self, memory: Memory) -> None:
        self.taken.remove((memory.data, memory.end))

    def forget(self, memory: Memory) -> None:
        """A buffer lost its name or a lease: its extent is free when it has neither."""
        if self.num_leases(memory) == 0 and all(
            entry.memory is not memory for entry in self.entries.values()
        ):
            self.untake(memory)

    # -- what the model does to the device --------------------------------------------------------

    def may_touch(self, memory: Memory, stream: int, writes: bool) -> bool:
        """Make `stream` wait for the work before; False where a capture forbids it."""
        before = ({memory.writer} | (memory.readers if writes else set())) - {stream, None}
        if before and (stream in self.captured or before & self.captured):
            return False
        for other in before:
            self.device.order(other, stream)
        return True

    def note_write(self, memory: Memory, stream: int) -> None:
        memory.writer, memory.readers = stream, set()

    def write(self, memory: Memory, stream: int) -> None:
        if memory.num_bytes == 0 or not self.may_touch(memory, stream, writes=True):
            return
        self.stamp = self.stamp % 255 + 1
        self.device.write(memory.data, memory.num_bytes, self.stamp, stream)
        memory.content = [(memory.num_bytes, self.stamp)]
        self.note_write(memory, stream)

    def read(self, memory: Memory, stream: int) -> None:
        if not self.may_touch(memory, stream, writes=False):
            return
        at = memory.data
        for length, stamp in memory.content:
            if stamp is not None and length > 0:
                self.device.expect(at, length, stamp, stream)
            at += length
        memory.readers.add(stream)

    def attempt(self, failure: Failure | None, act: Callable[[], Any]) -> Any:
        """Return what `act` gives, or None where it ran out of memory or the driver failed."""
        result = None
        if failure is not None:
            self.device.fail_at(*failure)
        try:
            result = act()
            result = True if result is None else result
        except OutOfMemory:
            pass
        except DeviceError:
            assert failure is not None or self.captured
        finally:
            self.device.fail_at(0, 0, False)
        return result

    def refuses(self, act: Callable[[], Any]) -> None:
        with pytest.raises(InvalidArgument):
            act()

    def check(self) -> None:
        if not getattr(self, "is_made", False):
            return
        type(self).num_steps += 1
        problems = self.device.violations()
        assert not problems, problems[0]  # I4 I5 I6 I8
        self.device.check_integrity()  # I7
        assert self.device.created_bytes() == self.device.mapped_bytes()  # I10
        entries = self.device.entries()
        assert {(name, size, leases) for name, size, leases, _ in entries} == {
            (name, entry.memory.num_bytes, self.num_leases(entry.memory))
            for name, entry in self.entries.items()
        }
        live = self.live({name for name, _, _, is_evicted in entries if is_evicted})
        requested, blocks, reserved, parts = self.device.counts()
        assert requested == sum(memory.num_bytes for memory in live)  # I10
        assert blocks == len(live)  # I10
        assert reserved == parts  # I12
        assert reserved <= BUDGET  # I4
        for name, _, _, is_evicted in entries:
            entry = self.entries[name]
            if entry.num_pins or entry.num_held:
                assert not is_evicted  # I9

    # -- buffers without a name -------------------------------------------------------------------

    @rule(size=sizes, zero=st.booleans(), pick=picks, failure=failures)
    def allocate(self, size: int, zero: bool, pick: int, failure: Failure | None) -> None:
        stream = self.stream(pick)
        contents = ZERO if zero else UNDEFINED
        lease = self.attempt(
            failure, lambda: self.device.allocate(size, "", "u8", contents, stream)
        )
        if lease is not None:
            memory = Memory(lease.data, size, [(size, 0 if zero else None)], stream)
            self.take(memory)
            self.held.append(Held(lease, memory, stream))
            if not zero:
                self.write(memory, stream)
        self.check()

    @rule(pick=picks, failure=failures)
    def drop(self, pick: int, failure: Failure | None) -> None:
        if self.held:
            held = self.held.pop(pick % len(self.held))
            if failure is not None:
                self.device.fail_at(*failure)
            held.lease = None
            self.device.fail_at(0, 0, False)
            self.forget(held.memory)
            if failure is not None:
                self.device.trim()  # frees what the failure kept
        self.check()

    @rule(pick=picks, writes=st.booleans())
    def touch(self, pick: int, writes: bool) -> None:
        """Use a buffer that is held, as a tensor is used: without asking the pool."""
        if self.held:
            held = self.held[pick % len(self.held)]
            names_of = [n for n, entry in self.entries.items() if entry.memory is held.memory]
            entry = self.entries[names_of[0]] if names_of else None
            if held.stream in self.streams and (
                entry is None or (not entry.is_scheduled and names_of[0] not in self.evicted())
            ):
                if writes and not (entry and entry.is_frozen):
                    self.write(held.memory, held.stream)
                else:
                    self.read(held.memory, held.stream)
        self.check()

    @rule(pick=picks, other=picks, failure=failures)
    def record_use(self, pick: int, other: int, failure: Failure | None) -> None:
        """Read a held buffer on another stream; who gets the memory next must wait for that."""
        if self.held:
            held = self.held[pick % len(self.held)]
            stream = self.stream(other)
            evicted = {self.entries[name].memory.data for name in self.evicted()}
            if held.memory.data in evicted:
                self.refuses(lambda: self.device.record_use(held.memory.data, stream))
            else:
                call = lambda: self.device.record_use(held.memory.data, stream)  # noqa: E731
                if self.attempt(failure, call) and not self.is_in_schedule(held.memory):
                    self.read(held.memory, stream)
        self.check()

    def is_in_schedule(self, memory: Memory) -> bool:
        return any(e.memory is memory and e.is_scheduled for e in self.entries.values())

    # -- names ------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        size=sizes,
        layout=layouts,
        contents=st.sampled_from([UNDEFINED, ZERO, KEEP]),
        pick=picks,
        failure=failures,
    )
    def named(
        self, name: str, size: int, layout: str, contents: int, pick: int, failure: Failure | None
    ) -> None:
        self.renew(name, size, layout, contents, self.stream(pick), failure, keeps=pick % 4 == 0)
        self.check()

    @rule(entry=picks, pick=picks, contents=st.sampled_from([UNDEFINED, KEEP]), failure=failures)
    def named_again(self, entry: int, pick: int, contents: int, failure: Failure | None) -> None:
        if (name := self.name(entry)) in self.entries:
            size, layout = self.entries[name].memory.num_bytes, self.entries[name].layout
            stream = self.stream(pick)
            self.renew(name, size, layout, contents, stream, failure, keeps=pick % 4 == 0)
        self.check()

    def renew(
        self,
        name: str,
        size: int,
        layout: str,
        contents: int,
        stream: int,
        failure: Failure | None,
        *,
        keeps: bool,
    ) -> None:
        """Allocate under a name, and keep the lease or drop it at once."""
        if self.renew_held(name, size, layout, contents, stream, failure) and not keeps:
            held = self.held.pop()
            held.lease = None
            self.forget(held.memory)

    def renew_held(
        self,
        name: str,
        size: int,
        layout: str,
        contents: int,
        stream: int,
        failure: Failure | None,
    ) -> bool:
        entry = self.entries.get(name)
        call = lambda: self.device.allocate(size, name, layout, contents, stream)  # noqa: E731
        if entry is None:
            if (lease := self.attempt(failure, call)) is not None:
                content: Content = [(size, None if contents == UNDEFINED else 0)]
                memory = Memory(lease.data, size, content, stream)
                self.take(memory)
                self.entries[name] = Entry(memory, layout)
                self.held.append(Held(lease, memory, stream))
                if contents == UNDEFINED:
                    self.write(memory, stream)
            return lease is not None
        old = entry.memory
        is_same = old.num_bytes == size and entry.layout == layout
        is_rewritten = not is_same or contents == ZERO
        was_evicted = name in self.evicted()
        if is_rewritten and (entry.num_pins or entry.num_held):
            self.refuses(call)
            return False
        # The user's part: `stream` comes after whoever used the entry.
        if not was_evicted and not self.may_touch(old, stream, writes=is_rewritten):
            return False
        lease = self.attempt(failure, call)
        if was_evicted and name not in self.evicted():  # also where a later call failed
            self.note_write(old, stream)
        if lease is None:
            if is_rewritten:
                old.readers.add(stream)  # a copy of it may have been queued
            return False
        if is_same:
            assert lease.data == old.data  # I3
            if contents == ZERO:
                old.content = [(size, 0)]
                entry.is_frozen = False
                self.note_write(old, stream)
        else:
            kept: Content = {UNDEFINED: [(size, None)], ZERO: [(size, 0)]}.get(
                contents, cut(old.content, size)
            )
            num_leases = self.num_leases(old)
            if num_leases == 0 and lease.data == old.data:
                self.untake(old)
                old.num_bytes = size
                old.content = kept
                self.take(old)
                self.note_write(old, stream)
            else:
                old.readers.add(stream)
                entry.memory = Memory(lease.data, size, kept, stream)
                if num_leases == 0:
                    self.untake(old)
                self.take(entry.memory)
            entry.layout = layout
            entry.is_frozen = False
        self.held.append(Held(lease, entry.memory, stream))
        return True

    @rule(entry_pick=picks, pick=picks, failure=failures)
    def free(self, entry_pick: int, pick: int, failure: Failure | None) -> None:
        name = self.name(entry_pick)
        stream = self.stream(pick)
        entry = self.entries.get(name)
        call = lambda: self.device.free(name, stream)  # noqa: E731
        if entry is None or entry.num_pins or entry.num_held:
            self.refuses(call)
        else:
            was_evicted = name in self.evicted()
            if self.attempt(failure, call):
                del self.entries[name]
                self.forget(entry.memory)
            if was_evicted and name not in self.evicted():
                self.note_write(entry.memory, stream)
            if failure is not None:
                self.device.trim()
        self.check()

    @rule(entry_pick=picks, pick=picks, writes=st.booleans(), failure=failures)
    def use(self, entry_pick: int, pick: int, writes: bool, failure: Failure | None) -> None:
        """Use an entry between acquire and release."""
        name = self.name(entry_pick)
        if self.hold_entry(name, self.stream(pick), failure):
            entry = self.entries[name]
            if writes and not entry.is_frozen:
                self.write(entry.memory, self.stream(pick))
            else:
                self.read(entry.memory, self.stream(pick))
            self.device.release(name, self.stream(pick))
            entry.num_held -= 1
        self.check()

    @rule(entry_pick=picks, pick=picks, failure=failures)
    def hold(self, entry_pick: int, pick: int, failure: Failure | None) -> None:
        name = self.name(entry_pick)
        self.hold_entry(name, self.stream(pick), failure)
        self.check()

    def hold_entry(self, name: str, stream: int, failure: Failure | None) -> bool:
        call = lambda: self.device.acquire(name, stream)  # noqa: E731
        if name not in self.entries:
            self.refuses(call)
            return False
        was_evicted = name in self.evicted()
        entry = self.entries[name]
        is_held = self.attempt(failure, call) is not None
        if was_evicted and name not in self.evicted():
            self.note_write(entry.memory, stream)
        entry.num_held += is_held
        return is_held

    @rule(entry_pick=picks, pick=picks)
    def release(self, entry_pick: int, pick: int) -> None:
        name = self.name(entry_pick)
        call = lambda: self.device.release(name, self.stream(pick))  # noqa: E731
        entry = self.entries.get(name)
        if entry is None or entry.num_held == 0:
            self.refuses(call)
        else:
            call()
            entry.num_held -= 1
        self.check()

    @rule(entry_pick=picks, pins=st.booleans())
    def pin(self, entry_pick: int, pins: bool) -> None:
        name = self.name(entry_pick)
        call = lambda: (self.device.pin if pins else self.device.unpin)(name)  # noqa: E731
        entry = self.entries.get(name)
        if entry is None or (name in self.evicted() if pins else entry.num_pins == 0):
            self.refuses(call)
        else:
            call()
            entry.num_pins += 1 if pins else -1
        self.check()

    @rule(entry_pick=picks, freezes=st.booleans(), failure=failures)
    def freeze(self, entry_pick: int, freezes: bool, failure: Failure | None) -> None:
        name = self.name(entry_pick)
        if name in self.entries:
            call = self.device.freeze if freezes else self.device.thaw
            assert self.attempt(failure, lambda: call(name))
            self.entries[name].is_frozen = freezes
        self.check()

    @rule(order=st.permutations(["a", "b", "c", "d", "e"]), length=st.integers(0, 5))
    def schedule(self, order: list[str], length: int) -> None:
        chosen = [name for name in order if name in self.entries][:length]
        self.device.set_schedule(chosen)
        for name, entry in self.entries.items():
            entry.is_scheduled = name in chosen
        self.check()

    @rule(entry_pick=picks, failure=failures)
    def evict(self, entry_pick: int, failure: Failure | None) -> None:
        name = self.name(entry_pick)
        entry = self.entries.get(name)
        call = lambda: self.device.evict(name)  # noqa: E731
        if entry is None:
            self.refuses(call)
        elif name in self.evicted():
            call()
        elif (
            entry.num_pins
            or entry.num_held
            or (self.num_leases(entry.memory) and not entry.is_scheduled)
        ):
            self.refuses(call)
        else:
            before = self.evicted()
            evicted = self.attempt(failure, call) is not None
            assert self.evicted() == before | ({name} if evicted else set())  # I10
        self.check()

    @rule(entry_pick=picks, pick=picks, failure=failures)
    def restore(self, entry_pick: int, pick: int, failure: Failure | None) -> None:
        name = self.name(entry_pick)
        stream = self.stream(pick)
        call = lambda: self.device.restore(name, stream)  # noqa: E731
        if name not in self.entries:
            self.refuses(call)
        else:
            was_evicted = name in self.evicted()
            entry = self.entries[name]
            data = entry.memory.data
            self.attempt(failure, call)
            if was_evicted and name not in self.evicted():
                self.note_write(entry.memory, stream)
                assert self.device.is_mapped(data, entry.memory.num_bytes)  # I2 I3
                self.read(entry.memory, stream)  # I8
        self.check()

    @rule(entry_pick=picks, pick=picks, other=picks, freezes=st.booleans())
    def round_trips(self, entry_pick: int, pick: int, other: int, freezes: bool) -> None:
        """Out and back twice: the second time a frozen entry is clean, a written one is not."""
        name, stream = self.name(entry_pick), self.stream(pick)
        entry = self.entries.get(name)
        if entry is not None and not entry.num_pins and not self.captured:
            entry.is_frozen = freezes
            (self.device.freeze if freezes else self.device.thaw)(name)
            clean = self.device.num_clean_evictions()
            for _ in range(2):
                if name not in self.evicted() and not self.leaves(name):
                    break
                if not self.attempt(None, lambda: self.device.restore(name, stream)):
                    break
                self.note_write(entry.memory, stream)
                self.read(entry.memory, stream)
                if not freezes and self.hold_entry(name, self.stream(other), None):
                    self.write(entry.memory, self.stream(other))
                    self.device.release(name, self.stream(other))
                    entry.num_held -= 1
                    assert self.device.num_clean_evictions() == clean
        self.check()

    def leaves(self, name: str) -> bool:
        entry = self.entries[name]
        if entry.num_held or (self.num_leases(entry.memory) and not entry.is_scheduled):
            return False
        return self.attempt(None, lambda: self.device.evict(name)) is not None

    # -- level 1 ----------------------------------------------------------------------------------

    @rule(size=sizes, pick=picks, failure=failures)
    def block_allocate(self, size: int, pick: int, failure: Failure | None) -> None:
        stream = self.stream(pick)
        data = self.attempt(failure, lambda: self.device.block_allocate(size, stream))
        if data is not None:
            memory = Memory(data, size, [(size, None)], stream)
            self.take(memory)
            self.blocks.append(memory)
            self.write(memory, stream)
        self.check()

    @rule(pick=picks, other=picks, twice=st.booleans(), failure=failures)
    def block_free(self, pick: int, other: int, twice: bool, failure: Failure | None) -> None:
        if self.blocks:
            memory = self.blocks[pick % len(self.blocks)]
            stream = self.stream(other)
            if self.may_touch(memory, stream, writes=True) and self.attempt(
                failure, lambda: self.device.block_free(memory.data, stream)
            ):
                self.blocks.remove(memory)
                self.untake(memory)
                if twice:
                    self.refuses(lambda: self.device.block_free(memory.data, stream))
        self.check()

    @rule(pick=picks, size=sizes, failure=failures)
    def block_grow(self, pick: int, size: int, failure: Failure | None) -> None:
        if self.blocks:
            memory = self.blocks[pick % len(self.blocks)]
            stream = memory.writer if memory.writer is not None else self.stream(pick)
            grows = lambda: self.device.block_grow(memory.data, size, stream)  # noqa: E731
            if size >= memory.num_bytes and self.attempt(failure, grows):
                self.untake(memory)
                memory.content = [*memory.content, (size - memory.num_bytes, None)]
                memory.num_bytes = size
                self.take(memory)
                self.read(memory, stream)
                self.write(memory, stream)
        self.check()

    @rule(pick=picks, other=picks, failure=failures)
    def block_record_use(self, pick: int, other: int, failure: Failure | None) -> None:
        """As record_use, but the stream's read is no part of what the owner waits for."""
        if self.blocks:
            memory = self.blocks[pick % len(self.blocks)]
            stream = self.stream(other)
            if self.attempt(failure, lambda: self.device.block_record_use(memory.data, stream)):
                self.read(memory, stream)
                if memory.writer in self.streams and not memory.readers & self.captured:
                    owner = memory.writer
                    if self.attempt(None, lambda: self.device.block_free(memory.data, owner)):
                        self.blocks.remove(memory)
                        self.untake(memory)
        self.check()

    @rule(pick=picks, failure=failures)
    def block_evict(self, pick: int, failure: Failure | None) -> None:
        if self.blocks and not self.captured:
            memory = self.blocks.pop(pick % len(self.blocks))
            self.device.synchronize()
            assert self.attempt(failure, lambda: self.device.block_evict(memory.data))
            self.evicted_blocks.append(memory)
        self.check()

    @rule(pick=picks, frees=st.booleans(), failure=failures)
    def block_restore(self, pick: int, frees: bool, failure: Failure | None) -> None:
        if self.evicted_blocks:
            memory = self.evicted_blocks[pick % len(self.evicted_blocks)]
            if frees:
                assert self.attempt(
                    failure, lambda: self.device.block_free(memory.data, self.stream(pick))
                )
                self.evicted_blocks.remove(memory)
                self.untake(memory)
            elif self.attempt(failure, lambda: self.device.block_restore(memory.data)):
                self.evicted_blocks.remove(memory)
                self.blocks.append(memory)
                memory.content = [(memory.num_bytes, None)]
                memory.writer, memory.readers = None, set()
                assert self.device.is_mapped(memory.data, memory.num_bytes)
                self.write(memory, self.stream(pick))
        self.check()

    # -- the device -------------------------------------------------------------------------------

    @rule(steps=st.integers(0, 30))
    def run(self, steps: int) -> None:
        self.device.run(steps) if steps < 30 else self.device.run_all()
        self.check()

    @rule(failure=failures)
    def trim(self, failure: Failure | None) -> None:
        self.attempt(failure, self.device.trim)
        self.check()

    @rule(pick=picks)
    def capture(self, pick: int) -> None:
        stream = self.stream(pick)
        if stream in self.captured:
            self.device.end_capture(stream)
            self.captured.remove(stream)
        elif not self.captured:
            self.device.begin_capture(stream)
            self.captured.add(stream)
            self.refuses(lambda: self.device.release_stream(stream))
        self.check()

    @rule()
    def create_stream(self) -> None:
        if len(self.streams) < 5:
            self.streams.append(self.device.create_stream())
        self.check()

    @rule(pick=picks, failure=failures)
    def destroy_stream(self, pick: int, failure: Failure | None) -> None:
        stream = self.stream(pick)
        others = [s for s in self.streams if s != stream and s not in self.captured]
        call = lambda: self.device.release_stream(stream)  # noqa: E731
        if stream not in self.captured and others and self.attempt(failure, call):
            # Whoever goes on with what this stream did waits for it while it lives.
            heir = others[0]
            self.device.order(stream, heir)
            for memory in self.everything():
                if memory.writer == stream:
                    memory.writer = heir
                if stream in memory.readers:
                    memory.readers = memory.readers - {stream} | {heir}
            self.streams.remove(stream)
            self.device.destroy_stream(stream)
        self.check()

    def everything(self) -> list[Memory]:
        return (
            [entry.memory for entry in self.entries.values()]
            + [held.memory for held in self.held]
            + self.blocks
            + self.evicted_blocks
        )

    def teardown(self) -> None:
        """Every byte is still there; then the pool goes first and its tensors after it."""
        if not getattr(self, "is_made", False):
            return
        for stream in self.captured:
            self.device.end_capture(stream)
        self.captured.clear()
        for name, entry in self.entries.items():
            for _ in range(entry.num_held):
                self.device.release(name, self.streams[0])
            entry.num_held = 0
        first = self.streams[0]
        for name, entry in self.entries.items():
            if self.hold_entry(name, first, None):
                self.read(entry.memory, first)
                self.device.release(name, first)
                entry.num_held -= 1
        named = [entry.memory for entry in self.entries.values()]
        for memory in self.live(self.evicted()):
            assert self.device.is_mapped(memory.data, memory.num_bytes)
            if all(memory is not other for other in named):
                self.read(memory, first)
        self.device.run_all()
        self.check()
        mapped = [held for held in self.held if not self.is_in_schedule(held.memory)]
        mapped = [
            h
            for h in mapped
            if h.memory.data not in {self.entries[n].memory.data for n in self.evicted()}
        ]
        self.device.drop()
        for held in mapped:
            assert self.device.is_mapped(held.memory.data, held.memory.num_bytes)  # I11
        self.held.clear()
        mapped.clear()
        problems = self.device.violations()
        assert not problems, problems[0]
