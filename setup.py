"""Build the native side: libfastgpt.so (core), _ops.so (torch ops, stable ABI), _C (classes).

Sources are found by convention, so a new file needs no entry here:
  csrc/**/*.cpp, *.cu without csrc/bindings  -> libfastgpt.so, no torch, no Python
  csrc/bindings/*_ops.cpp and stable.cpp     -> _ops.so
  csrc/bindings/, the rest                   -> _C
Instruction-set flags follow the file name (cmake/isa_flags.json). Switches: FASTGPT_CUDA=0|1|auto,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, FASTGPT_WERROR=1, FASTGPT_SANITIZE=address,undefined.
"""

import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> None:
    sys.exit(f"fastgpt build: {message}")


if sys.platform != "linux" or os.uname().machine != "x86_64":
    fail(f"platform {sys.platform}/{os.uname().machine} is not supported; use Linux on x86-64")
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail("torch is missing; pip install 'torch>=2.11' (build needs its headers)")
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    fail(f"torch {torch.__version__} is too old; pip install 'torch>=2.11'")
import pybind11  # noqa: E402
from setuptools import Extension, setup  # noqa: E402

CXX = os.environ.get("CXX", "g++")
if shutil.which(CXX.split()[-1]) is None:
    fail(f"C++ compiler {CXX!r} not found; install g++ >= 12 or set CXX")

# nvcc ------------------------------------------------------------------------------------------
DEFAULT_ARCHS = ("7.5", "8.0", "9.0a", "9.0+PTX")


def find_cuda_home() -> Path | None:
    """Return the toolkit's root: CUDA_HOME, else the nvcc on the PATH, else /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    candidates = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [*candidates, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def use_cuda() -> bool:
    choice = os.environ.get("FASTGPT_CUDA", "auto")
    if choice not in {"0", "1", "auto"}:
        fail(f"FASTGPT_CUDA is {choice!r}; expected 0, 1 or auto")
    if choice != "0" and CUDA_HOME and not (CUDA_HOME / "bin/nvcc").exists():
        fail(f"CUDA_HOME={CUDA_HOME} has no nvcc; unset it or set FASTGPT_CUDA=0")
    if choice == "1" and CUDA_HOME is None:
        fail("FASTGPT_CUDA=1 but nvcc was not found; install CUDA 13 or set CUDA_HOME")
    return choice != "0" and CUDA_HOME is not None


def cuda_archs() -> list[str]:
    """Return what is compiled: "8.0" is machine code, "9.0+PTX" is PTX alone.

    In TORCH_CUDA_ARCH_LIST "8.0+PTX" means both, as torch has it; "8.0-PTX" means PTX alone.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        return list(DEFAULT_ARCHS)
    archs = []
    for arch in listed:
        if not arch.endswith("-PTX"):
            archs.append(arch.removesuffix("+PTX"))
        if arch.endswith("PTX"):
            archs.append(arch[: -len("+PTX")] + "+PTX")
    return archs


def gencode_flags() -> list[str]:
    """Return nvcc's flags for cuda_archs()."""
    flags = []
    for arch in cuda_archs():
        number = arch.removesuffix("+PTX").replace(".", "")
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


CUDA_HOME = find_cuda_home()
WITH_CUDA = use_cuda()
if WITH_CUDA:
    cpp_extension.CUDA_HOME = str(CUDA_HOME)  # the CPU build of torch leaves it empty

# flags -----------------------------------------------------------------------------------------
ISA_FLAGS: dict[str, list[str]] = json.loads((ROOT / "cmake/isa_flags.json").read_text())
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
if os.environ.get("FASTGPT_WERROR") == "1":
    WARNINGS.append("-Werror")
CXX_FLAGS = ["-std=c++20", "-O3", "-g1", "-fvisibility-inlines-hidden", *WARNINGS]
if WITH_CUDA:
    CXX_FLAGS.append("-DFASTGPT_WITH_CUDA")
if "clang" in CXX:  # 16's VectorCombine pass recurses without end on gemm/panel_avx512bf16.cpp
    CXX_FLAGS += ["-mllvm", "-disable-vector-combine"]
LINK_FLAGS = ["-Wl,-rpath,$ORIGIN"]
if SANITIZE := os.environ.get("FASTGPT_SANITIZE"):
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    CXX_FLAGS += ["-O1"]  # with -O3 the panels compile for minutes
    LINK_FLAGS.append(f"-fsanitize={SANITIZE}")
NVCC_FLAGS = [
    "-std=c++20", "-O3", "--compress-mode=size", "-lineinfo", "--expt-relaxed-constexpr",
    "-DFASTGPT_WITH_CUDA", "-Xcompiler=-fPIC,-Wall", *gencode_flags(),
    *(["-Werror=all-warnings"] if "-Werror" in WARNINGS else []),
]  # fmt: skip
INCLUDES = [str(ROOT / "csrc"), str(ROOT / "csrc/include")]


def system_includes(*folders: str) -> list[str]:
    """Mark folders as system headers, whose warnings are not ours."""
    return [flag for folder in folders for flag in ("-isystem", folder)]


def isa_of(path: str) -> str | None:
    """Return the key of ISA_FLAGS whose suffix the file name carries, or None."""
    return next((isa for isa in ISA_FLAGS if Path(path).stem.endswith(f"_{isa}")), None)


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


bindings = sources("bindings/*.cpp")
torch_sources = [s for s in bindings if s.endswith(("_ops.cpp", "/stable.cpp"))]
core_sources = [s for s in sources("**/*.cpp") if s not in bindings]
if WITH_CUDA:
    core_sources += sources("**/*.cu")


class Build(cpp_extension.BuildExtension):
    """BuildExtension with plain library names and per-file instruction-set flags."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Kept, so an editable install is incremental.
        self.build_temp = str(ROOT / ("build/objects-sanitized" if SANITIZE else "build/objects"))
        self.force = True  # ninja knows what changed, headers and flags included

    def get_ext_filename(self, ext_name: str) -> str:
        *folders, name = ext_name.split(".")
        if name in {"libfastgpt", "_ops"}:
            return str(Path(*folders, f"{name}.so"))
        return super().get_ext_filename(ext_name)

    def remove_stale_cuda_objects(self) -> None:
        """Compile .cu files again when a header changed: a CPU build of torch does not track them.

        ccache answers for those the header does not reach.
        """
        headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]
        newest = max(header.stat().st_mtime for header in headers)
        for source in ROOT.glob("csrc/**/*.cu"):
            compiled = Path(self.build_temp, source.relative_to(ROOT)).with_suffix(".o")
            if compiled.exists() and compiled.stat().st_mtime < newest:
                compiled.unlink()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        self.remove_stale_cuda_objects()
        if ext.name == "fastgpt.libfastgpt":
            all_sources = ext.sources
            flags = ext.extra_compile_args["cxx"]
            for isa, isa_flags in ISA_FLAGS.items():
                if group := [s for s in all_sources if isa_of(s) == isa]:
                    ext.extra_objects += self.compiler.compile(
                        group,
                        output_dir=self.build_temp,
                        include_dirs=ext.include_dirs,
                        debug=self.debug,
                        extra_postargs={"cxx": [*flags, *isa_flags], "nvcc": []},
                        depends=ext.depends,
                    )
            ext.sources = [s for s in all_sources if isa_of(s) is None]
        else:
            ext.library_dirs.append(str(output))
        super().build_extension(ext)


def extension(name: str, files: list[str], flags: list[str], libraries: list[str]) -> Extension:
    cuda = name == "fastgpt.libfastgpt" and WITH_CUDA
    return Extension(
        name,
        files,
        include_dirs=INCLUDES + ([str(CUDA_HOME / "include")] if cuda else []),
        libraries=libraries + (["cudart_static", "dl", "rt"] if cuda else []),
        library_dirs=([str(CUDA_HOME / "lib64")] if cuda else [])
        + (cpp_extension.library_paths() if "torch_cpu" in libraries else []),
        extra_compile_args={"cxx": CXX_FLAGS + flags, "nvcc": NVCC_FLAGS},
        extra_link_args=LINK_FLAGS + (["-Wl,-z,defs"] if name != "fastgpt._C" else []),
        language="c++",
    )


TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
TORCH_FLAGS += system_includes(*cpp_extension.include_paths())
os.environ.setdefault("MAX_JOBS", str(max(1, min(
    len(os.sched_getaffinity(0)),
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 << 30),  # 3 GiB a compile job
))))  # fmt: skip

setup(
    ext_modules=[
        extension("fastgpt.libfastgpt", core_sources, [], ["pthread"]),
        extension("fastgpt._ops", torch_sources, TORCH_FLAGS, ["fastgpt", "torch_cpu"]),
        extension(
            "fastgpt._C",
            [s for s in bindings if s not in torch_sources],
            [
                "-fvisibility=hidden",
                f'-DFASTGPT_CUDA_ARCHS="{" ".join(cuda_archs() if WITH_CUDA else [])}"',
                *system_includes(pybind11.get_include()),
            ],
            ["fastgpt"],
        ),
    ],
    cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=False)},
)
