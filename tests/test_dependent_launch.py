"""Kernels that may overlap their predecessor wait for it: what the types cannot see, by reading.

`device::launch` takes only kernels whose one parameter is `device::Dependent<Args>`, and wait() is
the way to the arguments (csrc/device/dependent.cuh). What is left is checked here: that nothing on
the decode path goes around that launcher, and what is read ahead of a wait.
"""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FAMILIES = ("attention", "gemm", "kv_cache", "moe", "norm", "sampling")
SOURCES = sorted(
    path
    for family in FAMILIES
    for path in (CSRC / family).iterdir()
    if path.suffix in {".cu", ".cuh"} and path.name != "arrange_cuda.cu"  # runs at load, alone
)
KERNEL = re.compile(r"__global__ void\s+__launch_bounds__\([^;{]*?\)\s+(\w+)\(([^{;]*)\)\s*\{")


def code_of(path: Path) -> str:
    """The file without its comments."""
    return re.sub(r"//[^\n]*", "", path.read_text())


def body_at(text: str, begin: int) -> str:
    """The text from a brace to the one that closes it."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin : i + 1]
    raise AssertionError("braces do not match")


def kernels() -> list[tuple[str, str, str]]:
    """Name, parameters and body of every kernel of the decode path."""
    found = []
    for path in SOURCES:
        text = code_of(path)
        matches = list(KERNEL.finditer(text))
        assert len(matches) == text.count("__global__"), f"{path.name}: a kernel is not understood"
        found += [(m[1], " ".join(m[2].split()), body_at(text, m.end() - 1)) for m in matches]
    return found


KERNELS = kernels()
# Of csrc/gemm: they ask for weights, then wait.
READS_AHEAD = {"decode_kernel", "eight_bit_kernel", "hopper_kernel", "tiled_kernel"}


def test_every_family_is_seen() -> None:
    assert {path.parent.name for path in SOURCES} == set(FAMILIES)
    assert len(KERNELS) >= 18


@pytest.mark.parametrize(("name", "parameters", "body"), KERNELS, ids=[k[0] for k in KERNELS])
def test_kernel_takes_dependent_arguments_and_waits(name: str, parameters: str, body: str) -> None:
    assert re.fullmatch(r"const __grid_constant__ device::Dependent<.*> dependent", parameters)
    statements = [s for s in re.split(r"[;{}]", body) if "dependent." in s]
    if "dependent.constants()" in body:
        assert name in READS_AHEAD, f"{name} reads ahead of its wait; say why in READS_AHEAD"
        assert body.rindex("dependent.wait()") > body.index("dependent.constants()")
        return
    assert len(statements) == 1, f"{name} waits more than once"
    assert re.fullmatch(r"\s*const [\w<>]+& \w+ = dependent\.wait\(\)\s*", statements[0])
    before = body[: body.index("dependent.wait()")]
    # Kernels without code for an architecture may leave there; nobody launches them on it.
    before = re.sub(r"#if __CUDA_ARCH__ < .*?#endif", "", before, flags=re.DOTALL)
    before = before.replace("#if __CUDA_ARCH__ >= 800", "")  # around a whole body
    assert not re.search(r"\breturn\b|\bif\b|\bfor\b", before), f"{name} may leave before its wait"


@pytest.mark.parametrize("kernel", ["decode", "tiled"])
def test_products_wait_between_weights_and_activations(kernel: str) -> None:
    """The few-row products: experts wait before their weight is chosen, all before x is read."""
    text = code_of(CSRC / f"gemm/{kernel}.cuh")
    body = next(b for n, p, b in KERNELS if n == f"{kernel}_kernel" and "ProductArgs" in p)
    last_wait = body.rindex("dependent.wait()")
    ahead, after = body[:last_wait], body[last_wait:]
    assert text.count("dependent.wait()") == 2
    assert ahead.index("if (p.sorted_rows != nullptr) dependent.wait()") < ahead.index("row_tile<")
    for touched in ("p.x)", "x_offset", "p.bias", "p.out", "store_product", "load_16", "load_8"):
        assert touched not in ahead, f"{touched} stands before the wait"
    assert "x_offset" in after
    assert "store_product" in after
    returns = re.findall(r"[^;{}]*\breturn\b[^;]*", ahead)
    assert [" ".join(r.split()) for r in returns] == ["if (tile.count <= 0) return"]


def test_products_of_many_rows_wait_before_activations() -> None:
    """The copying warp asks for weights, then waits; the others wait before anything else."""
    text = code_of(CSRC / "gemm/hopper_copies.cuh")
    ahead = body_at(text, text.index("{", text.index("void run_ahead()")))
    assert "fetch(" in ahead
    assert "copy_box" not in ahead
    fetch = body_at(text, text.index("{", text.index("void fetch(")))
    for touched in ("args_.x", "p_.x", "p_.bias", "p_.out"):
        assert touched not in fetch, f"{touched} stands before the wait"
    kernel = next(b for n, _, b in KERNELS if n == "hopper_kernel")
    before = kernel[: kernel.index("dependent.wait()")]
    calls = re.findall(
        r"weights\.\w+|HopperRows<|Gather\(|sums\.run|split\.add|store_rows|tiles\.next", before
    )
    assert calls == ["weights.run_ahead"]
    assert "if constexpr (!kGathered) weights.run_ahead();" in before  # offsets are not constants
    roles = kernel[kernel.index("if (warp >= 8)") :]
    for registers in ("give_back_registers", "take_registers"):
        assert re.search(rf"{registers}<\d+>\(\);\s*dependent\.wait\(\);", roles)


def test_products_of_eight_bit_rows_wait_before_activations() -> None:
    """As those of 16-bit rows: nothing but weights is asked for ahead of the wait."""
    text = code_of(CSRC / "gemm/hopper_eight_bit.cuh")
    run = body_at(text, text.index("{", text.index("void run(const device::Dependent")))
    ahead = run[: run.index("dependent.wait()")]
    assert run.count("dependent.wait()") == 1
    assert "fetch_weight(" in ahead
    assert "fetch_x(" not in ahead
    fetch = body_at(text, text.index("{", text.index("void fetch_weight(")))
    for touched in ("tiles.x", "x_share", "x_scale,", "weight_scale", "bias", "out"):
        assert touched not in fetch, f"{touched} stands before the wait"
    kernel = next(b for n, _, b in KERNELS if n == "eight_bit_kernel")
    roles = kernel[kernel.index("if (warp >= 8)") :]
    assert re.match(r"if \(warp >= 8\) \{[^{}]*if \(warp > 8\) \{\s*dependent\.wait\(\);", roles)
    assert re.search(r"take_registers<\d+>\(\);\s*dependent\.wait\(\);", roles)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_goes_around_the_launcher(path: Path) -> None:
    text = code_of(path)
    assert "<<<" not in text, "launch by device::launch"
    assert "cudaLaunchKernel" not in text, "launch by device::launch"


def test_no_load_may_pass_a_wait() -> None:
    """Loads by ld.global.nc may be moved above the wait, to before the predecessor's writes."""
    for path in [*SOURCES, *(CSRC / "device").glob("*.cuh")]:
        assert not re.search(r"__ldg|__restrict__|ld\.global\.nc", code_of(path)), path.name
