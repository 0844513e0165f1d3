"""The architecture, executable: imports and includes point down, torch stays in csrc/bindings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top to bottom. A package may import from lines below its own: never from above, never from beside.
LAYERS = [
    {"cli"},
    {"server"},
    {"quant"},
    {"engine"},
    {"models"},
    {"layers"},
    {"ops", "memory", "pipeline"},
    {"checkpoint"},
    {"batch", "request", "tokenizer", "scheme"},
    {"config"},
    {"env", "logging", "testing", "units"},
    {"errors"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = [p for p in (ROOT / "fastgpt").rglob("*.py") if p != ROOT / "fastgpt" / "__init__.py"]
NATIVE = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def imported_packages(path: Path) -> set[str]:
    """Return every X imported from fastgpt.X in the file, deferred imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use absolute imports"
            modules = (
                [node.module]
                if node.module != "fastgpt"
                else [f"fastgpt.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        names |= {m.split(".")[1] for m in modules if m.startswith("fastgpt.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(ROOT / "fastgpt").parts[0].removesuffix(".py")
    for other in imported_packages(path) - {here, "_C"}:
        assert other in RANK, f"fastgpt.{other} has no layer; add it to LAYERS"
        assert RANK[other] > RANK[here], (
            f"{path.name} ({here}) imports fastgpt.{other}, which is not below it"
        )


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_stay_home(path: Path) -> None:
    """A kernel family includes itself, public headers and device/; only bindings include torch."""
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for n, line in enumerate(path.read_text().splitlines(), 1):
        if not (match := re.match(r'\s*#\s*include\s*([<"])(\w+)', line)):
            continue
        bracket, top = match.groups()
        if top in {"torch", "ATen", "c10", "pybind11"}:
            assert folder == "bindings", f"{path}:{n}: {top} belongs in csrc/bindings only"
        elif bracket == '"':
            allowed = {"fastgpt", folder} | (
                set() if folder in {"include", "bindings"} else {"device"}
            )
            assert top in allowed, f"{path}:{n}: {folder}/ may not include {top}/"
