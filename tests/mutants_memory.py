"""Break the memory pool on purpose, one defect at a time: the tests must notice every one.

    python tests/mutants_memory.py                 all mutants
    python tests/mutants_memory.py --only budget   those whose name contains "budget"

Each mutant is a copy of a few sources with one defect. The pool alone is built (csrc/memory, the
host and the fake device), then the C++ tests and the model test (tests/python/memory) run against
it. A mutant that passes both survives, and the script ends with an error. `threads` mutants are
data races: their C++ tests are compiled under ThreadSanitizer.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
CORE = [
    *sorted((ROOT / "csrc/memory").glob("*.cpp")),
    ROOT / "csrc/runtime/upstream_cpu.cpp",
    ROOT / "csrc/runtime/upstream_fake.cpp",
    ROOT / "csrc/runtime/happens_before.cpp",
]
BINDINGS = [ROOT / "csrc/bindings/fake_module.cpp", ROOT / "csrc/bindings/errors.cpp"]
CPP_TESTS = sorted((ROOT / "tests/cpp/memory").glob("*_test.cpp"))
SECONDS = 600  # a test that takes longer hangs, also on a busy machine
MODEL_STEPS = 20_000
MODULE = """
#include "bindings/module.h"
PYBIND11_MODULE(_C, m) {
  pybind11::register_local_exception_translator(&fastgpt::bindings::translate_errors);
  fastgpt::bindings::bind_fake(m);
}
"""
MODEL = f"""
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from pool_machine import PoolMachine

part = 0
while PoolMachine.num_steps < {MODEL_STEPS}:
    run_state_machine_as_test(
        seed(part)(PoolMachine),
        settings=settings(max_examples=40, stateful_step_count=100, database=None, deadline=None,
                          phases=[Phase.generate], suppress_health_check=list(HealthCheck)),
    )
    part += 1
"""


@dataclass(frozen=True)
class Mutant:
    """Replacements (file in csrc/, text that occurs once, text that is wrong)."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    threads: bool = False


def mutant(name: str, file: str, old: str, new: str, *, threads: bool = False) -> Mutant:
    return Mutant(name, ((f"memory/{file}", old, new),), threads)


MUTANTS = [
    # the heap
    mutant(
        "no coalesce",
        "heap.cpp",
        "next != nullptr && next->is(State::kFree)) {\n    remove(next);",
        "false) {\n    remove(next);",
    ),
    mutant("fence dropped on merge", "heap.cpp", "    left->streams |= right->streams;\n", ""),
    mutant(
        "tick dropped on merge",
        "heap.cpp",
        "    left->tick = std::max(left->tick, right->tick);\n",
        "",
    ),
    mutant(
        "fence dropped on split",
        "heap.cpp",
        "    tail->streams = block->streams;\n    insert(tail);\n  }\n  block->requested",
        "    insert(tail);\n  }\n  block->requested",
    ),
    # order between streams
    mutant(
        "no cross-stream wait",
        "stream_order.cpp",
        "    upstream_->wait(stream, slots_[i].event);\n",
        "",
    ),
    mutant(
        "stale event waited for",
        "stream_order.cpp",
        "if (other.recorded >= tick) return true;",
        "if (other.event != nullptr) return true;",
    ),
    mutant("other stream's use forgotten", "arena.cpp", "    block->streams |= bit;\n", ""),
    mutant(
        "released stream not recorded",
        "stream_order.cpp",
        "FASTGPT_CHECK(record_up_to(slots_[at], slots_[at].last), ",
        "FASTGPT_CHECK(true, ",
    ),
    mutant(
        "slot of a busy stream given away",
        "stream_order.cpp",
        "return slot.over >= slot.last; };",
        "return slot.last > 0; };",
    ),
    mutant(
        "capture waits for the outside",
        "stream_order.cpp",
        "  if (upstream_->is_capturing(stream)) return false;\n",
        "",
    ),
    mutant(
        "lane gives memory to any stream",
        "lanes.cpp",
        "lane.stream != stream || ",
        "",
    ),
    # blocks
    mutant(
        "double free accepted",
        "arena_impl.h",
        "block != nullptr && block->is(State::kLive)",
        "block != nullptr",
    ),
    mutant(
        "statistic wrong on a failure path",
        "arena.cpp",
        "block->bytes + next->bytes < bytes || !order.wait(next->fence(), stream))) {\n"
        "    return false;\n  }\n  count_live(block, -1);\n",
        "block->bytes + next->bytes < bytes)) {\n    return false;\n  }\n"
        "  count_live(block, -1);\n"
        "  if (must_grow && !order.wait(next->fence(), stream)) {\n"
        "    count_live(block, 1);\n    return false;\n  }\n",
    ),
    mutant(
        "failed free leaves the block dead",
        "arena.cpp",
        "    block->set(State::kLive);\n    throw;",
        "    throw;",
    ),
    # physical memory
    mutant(
        "budget off by one handle",
        "backing.h",
        "return budget_bytes_ - committed_bytes_;",
        "return budget_bytes_ + handle_bytes_ - committed_bytes_;",
    ),
    mutant(
        "handles lost when map fails",
        "backing.cpp",
        "    if (!upstream_->map(gap.begin, handles)) {\n      destroy_all();\n",
        "    if (!upstream_->map(gap.begin, handles)) {\n",
    ),
    mutant(
        "failed unmap taken for done",
        "arena_physical.cpp",
        "  const bool done = backing.unmap(mapped);",
        "  backing.unmap(mapped);\n  const bool done = true;",
    ),
    mutant(
        "live handle unmapped",
        "arena_physical.cpp",
        "is_vacant &= b->is(State::kFree)",
        "is_vacant &= b->is(State::kLive) || b->is(State::kFree)",
    ),
    mutant(
        "handle unmapped before its fence is over",
        "arena_physical.cpp",
        "if (may_wait ? !order.wait_on_host(vacant.fence) : !order.is_over(vacant.fence))",
        "if (false)",
    ),
    # entries
    mutant(
        "wrong-shape alias",
        "layer_cache.cpp",
        "if (is_same || (old.num_leases == 0 && arena_->grow",
        "if (is_same || (arena_->grow",
    ),
    mutant(
        "kept bytes shared with a moved entry forgotten",
        "layer_cache.cpp",
        "if (contents == Contents::kKeep && kept > 0) upstream.copy",
        "if (false) upstream.copy",
    ),
    mutant(
        "rest of a grown entry not cleared",
        "layer_cache.cpp",
        "    upstream.fill_zero(static_cast<std::byte*>(data) + kept, bytes - kept, stream);\n",
        "",
    ),
    mutant(
        "buffer leaks when its fill fails",
        "layer_cache.cpp",
        "  } catch (...) {\n    give_back(*arena_, data, {stream});\n    throw;\n  }\n"
        "  const std::uint64_t id",
        "  } catch (...) {\n    throw;\n  }\n  const std::uint64_t id",
    ),
    mutant(
        "failed fill leaves the new size",
        "layer_cache.cpp",
        "      (void)arena_->grow(old.data, old.bytes, stream);",
        "      ",
    ),
    mutant(
        "evict while leased",
        "layer_cache_swap.cpp",
        " &&\n         (buffer.num_leases == 0 || buffer.schedule_index >= 0);",
        ";",
    ),
    mutant(
        "evict while acquired",
        "layer_cache_swap.cpp",
        "buffer.num_pins == 0 && buffer.num_acquired == 0 &&",
        "buffer.num_pins == 0 &&",
    ),
    mutant(
        "evict while pinned",
        "layer_cache_swap.cpp",
        "buffer.num_pins == 0 && buffer.num_acquired == 0 &&",
        "buffer.num_acquired == 0 &&",
    ),
    mutant(
        "dirty treated clean",
        "layer_cache.cpp",
        "  buffer.is_frozen = false;\n  if (buffer.where == Where::kDevice) drop",
        "  if (buffer.where == Where::kReturning) drop",
    ),
    mutant(
        "eviction does not wait for the users",
        "layer_cache_swap.cpp",
        "    upstream.wait(out_stream_, done);\n",
        "",
    ),
    mutant(
        "restore not waited for",
        "layer_cache_swap.cpp",
        "  upstream.wait(stream, returned.get());\n",
        "",
    ),
    mutant(
        "second stream does not wait for the return",
        "layer_cache.cpp",
        "  upstream.wait(stream, buffer.returned);\n",
        "",
    ),
    mutant(
        "copy stops one chunk early",
        "layer_cache_swap.cpp",
        "host != nullptr && at < buffer.bytes;",
        "host != nullptr && at + swap_.chunk_bytes < buffer.bytes;",
    ),
    mutant(
        "nearest in the schedule leaves first",
        "layer_cache_swap.cpp",
        "(buffer.schedule_index - schedule_at_ + schedule_size_) % schedule_size_",
        "(schedule_at_ - buffer.schedule_index + schedule_size_) % schedule_size_",
    ),
    mutant(
        "users of a freed buffer forgotten",
        "layer_cache.cpp",
        "        for (void* user : users) arena->record_use(data, user);\n",
        "",
    ),
    # threads
    mutant(
        "unlock before update",
        "arena.cpp",
        "    std::lock_guard lock(mutex);\n    const Fence fence = stream == nullptr",
        "    { std::lock_guard lock(mutex); }\n    const Fence fence = stream == nullptr",
        threads=True,
    ),
    mutant(
        "eviction forgets to lock again",
        "layer_cache_swap.cpp",
        "  lock.lock();\n  finish_eviction(buffer, host);",
        "  finish_eviction(buffer, host);",
        threads=True,
    ),
]


class Builder:
    """Compiles the pool, its C++ tests and its fake Python package into one folder."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder, self.flags = folder, flags
        (folder / "package/fastgpt").mkdir(parents=True)
        (folder / "package/fastgpt/__init__.py").touch()
        (folder / "package/fastgpt/errors.py").symlink_to(ROOT / "fastgpt/errors.py")
        (folder / "package/pool_machine.py").symlink_to(
            ROOT / "tests/python/memory/pool_machine.py"
        )
        (folder / "module.cpp").write_text(MODULE)

    def compile(self, source: Path, target: Path, first_include: Path | None = None) -> Path:
        includes = [first_include] if first_include else []
        includes += [ROOT / "csrc", ROOT / "csrc/include", ROOT / "tests/cpp"]
        run(
            [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-fPIC", "-fvisibility=default"],
            *self.flags,
            *(flag for include in includes for flag in ("-I", include)),
            *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]),
            *("-c", source, "-o", target),
        )
        return target

    def compile_all(self, sources: list[Path]) -> dict[Path, Path]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            targets = [self.folder / f"{source.stem}.o" for source in sources]
            return dict(zip(sources, pool.map(self.compile, sources, targets), strict=True))

    def link(self, objects: list[Path], target: Path, *flags: str) -> None:
        run([*os.environ.get("CXX", "g++").split()], *self.flags, *objects, *flags, "-o", target)


def run(command: list[str], *more: object) -> None:
    line = [*command, *map(str, more)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(line)}\n{done.stderr}")


def why_it_fails(command: list[str], env: dict[str, str] | None = None) -> str | None:
    """Return the last line of a failed test's output; None where it passes."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if done.returncode == 0:
        return None
    marks = ("Error:", "Failure", "WARNING: ThreadSanitizer", "terminate called", "assert ")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    telling = [line.strip() for line in lines if any(mark in line for mark in marks)]
    return (telling or lines or [f"exit status {done.returncode}"])[-1][:90]


def mutated(folder: Path, change: Mutant) -> dict[str, Path]:
    """Write the changed files below `folder`; return them by their name in csrc/."""
    changed: dict[str, Path] = {}
    for name, old, new in change.edits:
        path = folder / name
        text = (path if name in changed else ROOT / "csrc" / name).read_text()
        if text.count(old) != 1:
            sys.exit(
                f"mutant '{change.name}': {name} has its text {text.count(old)} times, not once"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new))
        changed[name] = path
    return changed


class Suite:
    """The tests, built once; a mutant replaces the objects it changes."""

    def __init__(self, folder: Path, *, threads: bool) -> None:
        self.threads = threads
        flags = ["-O1", "-g1", *(["-fsanitize=thread"] if threads else [])]
        self.builder = Builder(folder, flags)
        self.core = self.builder.compile_all(CORE)
        self.tests = self.builder.compile_all(CPP_TESTS)
        self.bindings: dict[Path, Path] = {}
        if not threads:
            self.bindings = self.builder.compile_all([*BINDINGS, folder / "module.cpp"])

    def verdicts(self, change: Mutant) -> dict[str, str | None]:
        """Return what each test says of a mutant: its failure, or None."""
        core = dict(self.core)
        with tempfile.TemporaryDirectory() as scratch:
            changed = mutated(Path(scratch), change)
            has_header = any(name.endswith(".h") for name in changed)
            for source in CORE:
                name = str(source.relative_to(ROOT / "csrc"))
                if name in changed or (has_header and source.parent.name == "memory"):
                    # Beside its mutated headers: quotes look in the file's own folder first.
                    copy = Path(scratch) / name
                    if name not in changed:
                        copy.write_text(source.read_text())
                    target = Path(scratch) / f"{source.stem}.o"
                    core[source] = self.builder.compile(copy, target, Path(scratch))
            return self.run_tests([*core.values()])

    def run_tests(self, core: list[Path]) -> dict[str, str | None]:
        folder = self.builder.folder
        self.builder.link(
            [*core, *self.tests.values()],
            folder / "cpp_tests",
            *("-lgtest", "-lgtest_main", "-lpthread"),
        )
        # Address randomization moves memory to where ThreadSanitizer has its shadow.
        verdicts = {
            "C++": why_it_fails(
                [*(["setarch", "-R"] if self.threads else []), str(folder / "cpp_tests")],
                {"TSAN_OPTIONS": "halt_on_error=1"},
            )
        }
        if not self.threads:
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            self.builder.link(
                [*core, *self.bindings.values()],
                folder / f"package/fastgpt/_C{suffix}",
                "-shared",
            )
            verdicts["model"] = why_it_fails(
                # -P: not the fastgpt of the folder this runs in.
                [sys.executable, "-P", "-c", MODEL],
                {"PYTHONPATH": str(folder / "package")},
            )
        return verdicts


def judge(changes: list[Mutant]) -> list[str]:
    """Run the mutants; return the names of those that survive."""
    survivors = []
    for threads in (False, True):
        chosen = [change for change in changes if change.threads == threads]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            suite = Suite(Path(folder), threads=threads)
            for test, failure in suite.run_tests([*suite.core.values()]).items():
                if failure is not None:
                    sys.exit(f"the {test} test fails without a mutant: {failure}")
            print(f"built and passing in {time.monotonic() - begin:.0f} s", flush=True)
            for change in chosen:
                begin = time.monotonic()
                verdicts = suite.verdicts(change)
                killers = [test for test, failure in verdicts.items() if failure is not None]
                survivors += [] if killers else [change.name]
                print(
                    f"{'killed by ' + ' and '.join(killers) if killers else 'SURVIVES':28}"
                    f"{change.name}  ({time.monotonic() - begin:.0f} s)",
                    flush=True,
                )
                for test, failure in verdicts.items():
                    print(f"{'':10}{test}: {failure}", flush=True)
    return survivors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names to run")
    arguments = parser.parse_args()
    changes = [c for c in MUTANTS if any(part in c.name for part in arguments.only)]
    if not changes:
        sys.exit(f"no mutant's name contains {arguments.only!r}")
    begin = time.monotonic()
    survivors = judge(changes)
    print(
        f"{len(changes) - len(survivors)} of {len(changes)} mutants killed "
        f"in {time.monotonic() - begin:.0f} s"
    )
    if survivors:
        sys.exit(f"survivors: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
