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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, such as m.pt.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="four-tier, fp8, w8a8, int4, int3, or a YAML or JSON file.")
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
    rotate: Annotated[
        str, typer.Option(help="The residual stream: never, always, or auto: where it helps.")
    ] = "never",
    calibration: Annotated[
        str, typer.Option(help="self (the model's own generations), none, or a text file.")
    ] = "self",
    seed: Annotated[int, typer.Option(help="Of the model's own generations.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda:0.")] = None,
    format: Annotated[
        str,
        typer.Option(help="fastgpt, or compressed-tensors: a directory for vLLM, transformers."),
    ] = "fastgpt",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run into this file was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or an unfinished run into it.")
    ] = False,
) -> None:
    """Quantize a model into one file, or into a directory for other engines."""
    from dataclasses import replace

    from fastgpt import env
    from fastgpt.checkpoint.export import check_expressible
    from fastgpt.logging import setup
    from fastgpt.models.placement import resolve_device
    from fastgpt.quant import Calibration, Quantizer

    setup(env.log_level())
    # By way of a file of ours where another form is asked for: the run itself knows one only.
    file = None if dry_run else _file_to_write(output, format, resume=resume, overwrite=overwrite)

    quantizer = Quantizer(
        source,
        _read_policy(policy),
        tokenizer=tokenizer,
        sensitive="auto" if sensitive == ["auto"] else sensitive or (),
        budget=_budget(budget, max_kl, min_top1),
        rotate=rotate,
        calibration=replace(Calibration.parse(calibration), seed=seed),
        device=None if device is None else resolve_device(device),
        model_config=model_config,
    )
    if dry_run:
        typer.echo(str(quantizer.dry_run()))
        return
    assert output is not None
    assert file is not None
    if file != output:
        for item in quantizer.plan():
            check_expressible(item.name, item.format, item.shape)
    quantizer.write(file, resume=resume)
    if file != output:
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


def _file_to_write(output: Path | None, format: str, *, resume: bool, overwrite: bool) -> Path:
    """Return the file of ours to write: the output, or what another form is then made from."""
    from fastgpt.checkpoint.export import check_output
    from fastgpt.quant.journal import Journal

    if output is None or not output.name:
        raise ConfigError("--output is missing; name the file to write, or ask for --dry-run")
    check_output(output, format)
    if resume and overwrite:
        raise ConfigError("--resume goes on and --overwrite starts anew; give one of them")
    file = output if format == "fastgpt" else output.with_name(f".{output.name}.pt")
    is_unfinished = Journal.exists(file)
    if not resume and not overwrite and is_unfinished:
        raise ConfigError(
            f"a run into {output} was stopped; go on with --resume, or start anew with --overwrite"
        )
    if file == output and output.exists() and not overwrite and not is_unfinished:
        raise ConfigError(f"{output} exists; choose another file, or replace it with --overwrite")
    return file


def _budget(size: str | None, max_kl: float | None, min_top1: float | None) -> Any:
    """Return the budget the options describe, or None."""
    from dataclasses import replace

    from fastgpt.quant import Budget

    if size is None and max_kl is None and min_top1 is None:
        return None
    if size is None:
        return Budget(max_kl=max_kl, min_top1=min_top1)
    if max_kl is not None:
        raise ConfigError("give --budget or --max-kl, not both")
    return replace(Budget.parse(size), min_top1=min_top1)


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
