"""The build and the import say in one line what is missing and how to mend it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "C++ compiler 'no-such-compiler' not found; install g++"),
        ({"FASTGPT_CUDA": "yes"}, "FASTGPT_CUDA is 'yes'; expected 0, 1 or auto"),
        ({"FASTGPT_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "CUDA_HOME=/nonexistent has no nvcc"),
    ],
)
def test_build_failure_is_one_line(environment: dict[str, str], message: str) -> None:
    done = build(["--version"], **environment)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fastgpt build: ")
    assert message in line


def test_build_with_an_old_torch_names_the_version(tmp_path: Path) -> None:
    utils = tmp_path / "torch/utils"
    utils.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("__version__ = '2.5.1+cpu'\n")
    (utils / "__init__.py").write_text("")
    (utils / "cpp_extension.py").write_text("")
    done = build(["--version"], PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "torch 2.5.1+cpu is too old; pip install 'torch>=2.11'" in done.stderr


# An editable install finds its own fastgpt._C for any copy of the package.
WITHOUT_OTHER_COPIES = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
)


def test_import_without_the_library_says_how_to_build(tmp_path: Path) -> None:
    def sources_only(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".so") or name == "assets"]

    shutil.copytree(ROOT / "fastgpt", tmp_path / "fastgpt", ignore=sources_only)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OTHER_COPIES + "import fastgpt.ops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "not built; run `pip install .`" in last


def test_core_includes_no_torch_and_links_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"} and "bindings" not in path.parts:
            assert not re.search(r"#\s*include\s*<(torch|ATen|c10|Python)", path.read_text()), path
    needed = subprocess.run(
        ["readelf", "-d", ROOT / "fastgpt/libfastgpt.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch" not in needed
    assert "python" not in needed


def test_cmake_and_setup_compile_the_same_files_with_the_same_isa_flags() -> None:
    commands = ROOT / "build/cmake/compile_commands.json"
    if not commands.exists():
        pytest.skip("the CMake build was not made (no cmake or no GoogleTest)")
    isa_flags = json.loads((ROOT / "cmake/isa_flags.json").read_text())
    compiled = {}
    for entry in json.loads(commands.read_text()):
        path = Path(entry["file"]).resolve()
        if path.is_relative_to(ROOT / "csrc"):
            compiled[path] = {
                flag
                for flag in entry["command"].split()
                if re.fullmatch(r"-m(avx|fma|f16c)\w*", flag)
            }
    expected = {}
    for path in (ROOT / "csrc").rglob("*.cpp"):
        if "bindings" not in path.parts:
            isa = next((isa for isa in isa_flags if path.stem.endswith(f"_{isa}")), None)
            expected[path] = set(isa_flags[isa]) if isa else set()
    assert compiled == expected


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_find_package_works_from_another_project(tmp_path: Path) -> None:
    """A stranger's CMake project takes memory from the pool and dequantizes a row."""
    library = ROOT / "build/cmake/libfastgpt.so"
    if not library.exists():
        pytest.skip("the CMake build was not made (no cmake or no GoogleTest)")

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefix = tmp_path / "prefix"
    run("cmake", "--install", ROOT / "build/cmake", "--prefix", prefix)
    build_dir = tmp_path / "build"
    source = ROOT / "tests/cpp/consumer"
    run("cmake", "-S", source, "-B", build_dir, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build_dir)
    assert "the row is right" in run(build_dir / "consumer")
