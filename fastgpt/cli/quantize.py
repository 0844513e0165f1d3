"""`fastgpt quantize`: a checkpoint in, one file out."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgpt.errors import ConfigError

__all__ = ["quantize"]


def quantize(
    source: Annotated[
        str, typer.Argument(help="Hugging Face directory, FastGPT or GGUF file, or state-dict .pt.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, such as m.pt.")],
    policy: Annotated[
        str, typer.Option(help="four-tier, fp8, int4, or a YAML or JSON file.")
    ] = "four-tier",
    sensitive: Annotated[
        list[str] | None,
        typer.Option(help="Name, or part of one, that stays fp16; or auto."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory with tokenizer.json; default: the source's.")
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(help="config.json of a state-dict .pt; default: beside it.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Size of all weights: 4.7GB, or 4.5bpw.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Most KL divergence from the source, nats, measured.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Least share of same top tokens, such as 0.98.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="self (the model's own generations), none, or a text file.")
    ] = "self",
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda:0.")] = None,
    format: Annotated[
        str,
        typer.Option(help="fastgpt, or compressed-tensors: a directory for vLLM, transformers."),
    ] = "fastgpt",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, write nothing.")] = False,
) -> None:
    """Quantize a model into one file, or into a directory for other engines."""
    from fastgpt.checkpoint.export import check_expressible, check_output
    from fastgpt.quant import Quantizer

    check_output(output, format)
    quantizer = Quantizer(
        source,
        _read_policy(policy),
        tokenizer=tokenizer,
        sensitive="auto" if sensitive == ["auto"] else sensitive or (),
        budget=_budget(budget, max_kl, min_top1),
        calibration=calibration,
        device=device,
        model_config=model_config,
    )
    if dry_run:
        typer.echo(str(quantizer.dry_run()))
        return
    if format == "fastgpt":
        quantizer.write(output)
    else:
        # By way of a file of ours: the run itself knows one form only.
        for item in quantizer.plan():
            check_expressible(item.name, item.format, item.shape)
        file = output.with_name(f".{output.name}.pt")
        quantizer.write(file)
        _export(file, output)
        file.unlink()
    written = output.rglob("*") if output.is_dir() else [output]
    typer.echo(f"wrote {output}, {sum(file.stat().st_size for file in written):,} bytes")


def _export(file: Path, output: Path) -> None:
    """Write a file of ours as a compressed-tensors directory, one tensor in memory at a time."""
    from fastgpt.checkpoint import Container, write_compressed_tensors

    opened = Container(file)
    tensors = ((name, opened.read(name)) for name in opened.metadata.tensors)
    write_compressed_tensors(output, tensors, opened.metadata)


def _budget(size: str | None, max_kl: float | None, min_top1: float | None) -> Any:
    """Return the budget the options describe, or None."""
    from dataclasses import replace

    from fastgpt.quant import Budget

    if size is None and max_kl is None:
        if min_top1 is not None:
            raise ConfigError("--min-top1 goes with --budget or --max-kl")
        return None
    if size is not None and max_kl is not None:
        raise ConfigError("give --budget or --max-kl, not both")
    base = Budget(max_kl=max_kl) if size is None else Budget.parse(size)
    return replace(base, min_top1=min_top1)


def _read_policy(value: str) -> dict[str, Any] | str:
    """Return a preset's name as it is, a file's content otherwise."""
    path = Path(value)
    if path.suffix not in {".yaml", ".yml", ".json"}:
        return value
    import yaml

    try:
        content = path.read_text("utf-8")
        parsed = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(f"policy file {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"policy file {path} cannot be parsed: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"policy file {path} holds no mapping from roles to formats")
    return parsed
