"""`fastgpt inspect`: what a model file or directory holds."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgpt.errors import ConfigError

__all__ = ["inspect"]


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A FastGPT file, a Hugging Face directory, or a GGUF file.")
    ],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[REPORT]", help="With --report: a .html or .json file to write."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print the report as JSON, or write it to REPORT.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every tensor, checking its bytes.")
    ] = False,
) -> None:
    """Print what a model file holds."""
    from fastgpt.checkpoint import Container, open_checkpoint
    from fastgpt.quant import render_report
    from fastgpt.units import format_bytes

    checkpoint = open_checkpoint(path)
    container = checkpoint if isinstance(checkpoint, Container) else None
    if target is not None and not report:
        raise ConfigError(f"{target} is one argument too many; --report writes a report there")
    if report:
        _report(container, path, target)
        return
    config = checkpoint.config or {}
    names = checkpoint.names()
    _line("file", f"{path}")
    if container:
        size = path.stat().st_size
        version = container.metadata.format_version
        _line("size", f"{size:,} bytes, header {format_bytes(container.header_bytes)}")
        _line("format version", version)
    _line("model", ", ".join(config.get("architectures") or ["a module of another library"]))
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        if key in config:
            _line(key, config[key])
    _line("tensors", len(names))
    for group in checkpoint.imported:
        _line("imported", group)
    _line("multi-token prediction", _mtp(config, names))
    _line("tokenizer", "yes" if checkpoint.tokenizer_json else "none: serves token ids only")
    _line("chat template", "yes" if checkpoint.chat_template else "none")
    _line("generation config", json.dumps(checkpoint.generation_config))
    if container:
        _line("policy", json.dumps(container.metadata.policy))
        typer.echo("\n" + render_report(container.metadata.report))
    if tensors:
        typer.echo("")
        for name in names:
            typer.echo(f"{name}  {_describe(checkpoint, name)}")
    if verify:
        for name in names:
            checkpoint.read(name)
        found = "match their checksums" if container else "can be read; this form has no checksums"
        typer.echo(f"all {len(names)} tensors {found}")


def _report(container: Any, path: Path, target: Path | None) -> None:
    """Print the report, or write it as a page or as JSON."""
    from fastgpt.quant.report_page import report_json, report_page

    if container is None:
        raise ConfigError(f"{path} is not quantized, so it has no report")
    if target is None:
        typer.echo(json.dumps(report_json(container), indent=2))
        return
    if target.suffix not in {".html", ".json"}:
        raise ConfigError(f"the report goes to a .html or .json file, not to {target}")
    is_page = target.suffix == ".html"
    text = report_page(container) if is_page else json.dumps(report_json(container), indent=2)
    try:
        target.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {target}, {target.stat().st_size:,} bytes")


def _line(key: str, value: Any) -> None:
    typer.echo(f"{key + ':':24}{value}")


def _mtp(config: dict[str, Any], names: list[str]) -> str:
    from fastgpt.models.registry import family
    from fastgpt.quant.sources import is_known

    if not is_known(config):
        return "none"
    kind = family(config)
    parsed = kind.parse_config(config)
    count = sum(kind.is_mtp(parsed, name) for name in names)
    return f"{count} weights, kept, not loaded" if count else "none"


def _describe(checkpoint: Any, name: str) -> str:
    from fastgpt.scheme import QuantizedTensor

    stored = checkpoint.read(name)
    kind = stored.format if isinstance(stored, QuantizedTensor) else stored.dtype
    return f"{list(stored.shape)} {str(kind).removeprefix('torch.')}"
