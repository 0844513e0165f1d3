"""Everything that needs a GPU, in one run: tests, compute-sanitizer, decode speed; a table last.

    python benchmarks/gpu_check.py [--log FOLDER] [--skip tests,sanitizer,speed]

Tests and sanitizers run side by side, decode speed alone after them, each with overlapping launches
and without. The op library is used as it was built, on this machine or on one without a GPU; only
the class module is compiled here when it does not fit this Python. Exit code 0 only if every part
passed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "PYTHONUNBUFFERED": "1",
}
TOOLS = ("memcheck", "initcheck", "racecheck")
SPEED = (  # arguments of decode.py, most milliseconds a token
    (["--model", "fastgpt/assets/tiny-r1", "--prefill", "256"], 0.5),
    (["--shape", "r1-qwen-1.5b", "--policy", "bf16", "--prefill", "1024"], 2.0),
    (["--shape", "r1-qwen-1.5b", "--policy", "four-tier", "--prefill", "1024"], 2.0),
)


def run(command: list[str], log: Path, limit_s: float) -> tuple[int, str]:
    """Run a command with its output in a log; return its exit code and output."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit_s
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        parts = [
            p.decode() if isinstance(p, bytes) else p or "" for p in (error.stdout, error.stderr)
        ]
        code, text = 124, "".join(parts) + f"\nran past {limit_s:.0f} s"
    log.write_text(f"$ {' '.join(command)}\n{text}\nexit {code}\n")
    return code, text


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""


def build_class_module() -> str:
    """Compile fastgpt._C for this Python against the library at hand, if it is not there."""
    import sysconfig

    target = ROOT / f"fastgpt/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return "at hand"
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is None or pybind11.origin is None:
        sys.exit("gpu_check: pybind11 is missing; pip install pybind11")
    archs = os.environ.get("FASTGPT_CUDA_ARCHS", "7.5 8.0 9.0a 9.0+PTX")
    sources = [
        path
        for path in (ROOT / "csrc/bindings").glob("*.cpp")
        if not path.name.endswith("_ops.cpp") and path.name != "stable.cpp"
    ]
    flags = [
        "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden",
        f"-DFASTGPT_CUDA_ARCHS={json.dumps(archs)}", "-DFASTGPT_WITH_CUDA",
        f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}",
        f"-I{Path(pybind11.origin).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}",
    ]  # fmt: skip
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder, path.stem + ".o") for path in sources]
        compilers = [
            subprocess.Popen(["g++", *flags, "-c", str(path), "-o", str(target_object)])
            for path, target_object in zip(sources, objects, strict=True)
        ]
        codes = [compiler.wait() for compiler in compilers]
        if any(codes):
            sys.exit("gpu_check: the class module does not compile, see above")
        link = [
            "g++", "-shared", *map(str, objects), f"-L{ROOT / 'fastgpt'}", "-lfastgpt",
            "-Wl,-rpath,$ORIGIN", "-o", str(target),
        ]  # fmt: skip
        subprocess.run(link, check=True)
    return f"compiled in {time.monotonic() - start:.0f} s"


class Job:
    """A command that runs beside others, with its output in a log."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.path = log / f"{name}.log"
        self._file = self.path.open("w")
        self._file.write(f"$ {' '.join(command)}\n")
        self._file.flush()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": "2", "FASTGPT_NUM_THREADS": "2"},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a job is stopped with what it started
        )

    def finish(self, until: float) -> tuple[int, str]:
        """Wait until time.monotonic() is `until` at most; return the exit code and the output."""
        try:
            code = self._process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            code = 124
        self._file.write(f"\nexit {code}\n")
        self._file.close()
        return code, self.path.read_text()


def test_groups() -> list[list[str]]:
    """Return what each pytest process runs: a file with tests on the device each, then the rest."""
    files = sorted(
        path
        for path in (ROOT / "tests/python").rglob("test_*.py")
        if path.parent.name == "ops" or "gpu" in path.read_text()
    )
    rest = ["tests", *(f"--ignore={path.relative_to(ROOT)}" for path in files)]
    rest += ["--ignore=tests/e2e", "--ignore=tests/python/server"]  # HTTP clients, no GPU tests
    return [*([str(path.relative_to(ROOT))] for path in files), rest]


def start_tests(log: Path) -> list[Job]:
    """Start every test marked gpu: one process a group, and a group's in several with xdist."""
    workers = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    return [
        Job(f"pytest_{i}", [*command, *workers, *group], log)
        for i, group in enumerate(test_groups())
    ]


def test_row(jobs: list[Job], until: float) -> tuple[str, bool, str]:
    """Wait for the tests; a group without tests marked gpu (exit 5) is no failure."""
    passed, num_passed, bad = True, 0, []
    for job in jobs:
        code, text = job.finish(until)
        found = re.findall(r"(\d+) passed", text)
        num_passed += int(found[-1]) if found else 0
        if code not in (0, 5):
            passed = False
            failed = re.findall(r"(\d+) (?:failed|error)", text)
            bad.append(f"{job.name}.log: {failed[-1] + ' failed' if failed else f'exit {code}'}")
    text = "; ".join([f"{num_passed} passed", *bad])
    return "tests marked gpu", passed and num_passed > 0, text


def start_sanitizers(log: Path) -> list[Job]:
    """Start every tool over every registered op, and memcheck over the memory pool.

    A tool that refuses the device fails. torch's kernels are left out over the ops, which have
    kernels of their own; they are what reads and writes the pool's blocks.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    ops = [
        "--kernel-name-exclude", "kernel_substring=at::native", sys.executable,
        "benchmarks/op_cases.py", "--device", "cuda",
    ]  # fmt: skip
    programs = [(tool, tool, ops) for tool in TOOLS]
    programs.append(("memcheck_pool", "memcheck", [sys.executable, "benchmarks/pool_cases.py"]))
    return [
        Job(name, [program, "--tool", tool, "--error-exitcode", "9", *command], log)
        for name, tool, command in programs
    ]


def sanitizer_row(job: Job, until: float) -> tuple[str, bool, str]:
    code, text = job.finish(until)
    ran = re.search(r"(\d+) ops ran", text)
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): .*", text)
    passed = code == 0 and ran is not None and bool(summary)
    return job.name, passed, f"{ran[0] if ran else 'stopped'}; {summary[-1] if summary else code}"


def speed_row(arguments: list[str], limit_ms: float, log: Path) -> tuple[str, bool, str]:
    """Decode with and without overlapping launches, which must choose the same tokens."""
    command = [
        sys.executable, "benchmarks/decode.py", *arguments, "--device", "cuda",
        "--tokens", "32", "160", "--compare-pdl",
    ]  # fmt: skip
    code, text = run(command, log, 90)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    key = "ms_per_step_without_pdl"
    ordered = next((figures[key] for figures in lines if key in figures), float("nan"))
    if code != 0:
        note = f"{ordered:.3f} ms without overlap, then: {last_line(text)}"
        return " ".join(arguments[:4]), False, note
    figures = lines[-1]
    ms = figures["ms_per_step"]
    return (
        figures["model"],
        ms <= limit_ms,
        f"{ms:.3f} ms a token (limit {limit_ms}), {ordered:.3f} without overlap, "
        f"{figures['fraction_of_limit']:.2f} of "
        f"{figures['streaming_read_gb_per_s']:.0f} GB/s; prefill "
        f"{figures['prefill_tokens']}: {figures['prefill_tok_per_s']:.0f} tok/s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--skip", default="", help="comma-separated: tests, sanitizer, speed")
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds after which tests are stopped"
    )
    args = parser.parse_args()
    args.log.mkdir(parents=True, exist_ok=True)
    skip = set(filter(None, args.skip.split(",")))
    rows: list[tuple[str, bool, str]] = []

    print(f"class module: {build_class_module()}")
    for name in ("libfastgpt.so", "_ops.so"):
        digest = hashlib.sha256((ROOT / "fastgpt" / name).read_bytes()).hexdigest()
        print(f"{name}: sha256 {digest}", flush=True)
    # Tests and sanitizers share the device; what is timed has it alone.
    start = time.monotonic()
    until = start + args.limit
    command = [sys.executable, "benchmarks/op_cases.py", "--device", "cuda"]
    ops = Job("ops", command, args.log)
    sanitizers = [] if "sanitizer" in skip else start_sanitizers(args.log)
    tests = [] if "tests" in skip else start_tests(args.log)
    code, text = ops.finish(until)
    ran = re.search(r"\d+ ops ran", text)
    rows.append(("every op runs", code == 0, ran[0] if ran else f"exit {code}, see ops.log"))
    rows += [sanitizer_row(job, until) for job in sanitizers]
    if tests:
        rows.append(test_row(tests, until))
    for name, passed, text in rows:  # in case what follows is cut off
        print(f"{name}: {'ok' if passed else 'FAIL'}, {text}")
    print(f"tests and sanitizers: {time.monotonic() - start:.0f} s", flush=True)
    if "speed" not in skip:
        start = time.monotonic()
        for i, (arguments, limit_ms) in enumerate(SPEED):
            rows.append(speed_row(arguments, limit_ms, args.log / f"decode_{i}.log"))
            print(f"{rows[-1][0]}: {rows[-1][2]}", flush=True)
        print(f"speed: {time.monotonic() - start:.0f} s", flush=True)
    print()
    for name, passed, text in rows:
        print(f"{'ok  ' if passed else 'FAIL'}  {name:<28} {text}")
    sys.exit(0 if all(passed for _, passed, _ in rows) else 1)


if __name__ == "__main__":
    main()
