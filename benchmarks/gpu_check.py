"""Everything that needs a GPU, in one run: tests, compute-sanitizer, decode speed; a table last.

    python benchmarks/gpu_check.py [--log FOLDER] [--skip tests,sanitizer,speed]

The op library is used as it was built, on this machine or on one without a GPU; only the class
module is compiled here when it does not fit this Python. Exit code 0 only if every part passed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
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
        str(path)
        for path in (ROOT / "csrc/bindings").glob("*.cpp")
        if not path.name.endswith("_ops.cpp") and path.name != "stable.cpp"
    ]
    command = [
        "g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", *sources,
        f"-DFASTGPT_CUDA_ARCHS={json.dumps(archs)}", "-DFASTGPT_WITH_CUDA",
        f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}",
        f"-I{Path(pybind11.origin).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}",
        f"-L{ROOT / 'fastgpt'}", "-lfastgpt", "-Wl,-rpath,$ORIGIN", "-o", str(target),
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, check=True)
    return f"compiled in {time.monotonic() - start:.0f} s"


def check_tests(log: Path) -> tuple[bool, str]:
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
        "--ignore=tests/e2e", "--ignore=tests/python/server",  # HTTP clients, no GPU tests
    ]  # fmt: skip
    code, text = run(
        command,
        log / "pytest_gpu.log",
        300,
    )
    closing = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    return code == 0, closing[-1] if closing else f"exit {code}"


def check_sanitizer(log: Path) -> list[tuple[str, bool, str]]:
    """Run every tool over every registered op; a tool that refuses the device fails."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    running = []
    for tool in TOOLS:
        file = (log / f"sanitizer_{tool}.log").open("w")
        command = [
            program, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude",
            "kernel_substring=at::native", sys.executable, "benchmarks/op_cases.py",
            "--device", "cuda",
        ]  # fmt: skip
        running.append(
            (
                tool,
                file,
                subprocess.Popen(
                    command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
                ),
            )
        )
    rows = []
    for tool, file, process in running:
        try:
            code = process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            code = 124
        file.close()
        text = (log / f"sanitizer_{tool}.log").read_text()
        ran = re.search(r"(\d+) ops ran", text)
        summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): .*", text)
        passed = code == 0 and ran is not None and bool(summary)
        rows.append(
            (tool, passed, f"{ran[0] if ran else 'stopped'}; {summary[-1] if summary else code}")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--skip", default="", help="comma-separated: tests, sanitizer, speed")
    args = parser.parse_args()
    args.log.mkdir(parents=True, exist_ok=True)
    skip = set(filter(None, args.skip.split(",")))
    rows: list[tuple[str, bool, str]] = []

    print(f"class module: {build_class_module()}")
    for name in ("libfastgpt.so", "_ops.so"):
        digest = hashlib.sha256((ROOT / "fastgpt" / name).read_bytes()).hexdigest()
        print(f"{name}: sha256 {digest}", flush=True)
    command = [sys.executable, "benchmarks/op_cases.py", "--device", "cuda"]
    code, text = run(command, args.log / "ops.log", 120)
    rows.append(("every op runs", code == 0, last_line(text)))

    if "tests" not in skip:
        rows.append(("tests marked gpu", *check_tests(args.log)))
    if "sanitizer" not in skip:
        rows += check_sanitizer(args.log)
    if "speed" not in skip:
        for arguments, limit_ms in SPEED:
            command = [
                sys.executable, "benchmarks/decode.py", *arguments, "--device", "cuda",
                "--tokens", "32", "160",
            ]  # fmt: skip
            code, text = run(command, args.log / f"decode_{len(rows)}.log", 180)
            if code != 0:
                rows.append((" ".join(arguments[:4]), False, last_line(text)))
                continue
            figures = json.loads(text.strip().splitlines()[-1])
            ms = figures["ms_per_step"]
            rows.append(
                (
                    figures["model"],
                    ms <= limit_ms,
                    f"{ms:.3f} ms a token (limit {limit_ms}), "
                    f"{figures['fraction_of_limit']:.2f} of "
                    f"{figures['streaming_read_gb_per_s']:.0f} GB/s; prefill "
                    f"{figures['prefill_tokens']}: {figures['prefill_tok_per_s']:.0f} tok/s",
                )
            )
    print()
    for name, passed, text in rows:
        print(f"{'ok  ' if passed else 'FAIL'}  {name:<28} {text}")
    sys.exit(0 if all(passed for _, passed, _ in rows) else 1)


if __name__ == "__main__":
    main()
