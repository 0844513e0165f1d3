"""`fastgpt verify`: a file against its own certificate."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["verify"]


def verify(
    path: Annotated[Path, typer.Argument(help="A FastGPT file.")],
    source: Annotated[
        str | None, typer.Option(help="The model it was made from: checks all figures.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda:0.")] = None,
) -> None:
    """Check every hash a model file states, and measure its figures again."""
    from fastgpt.models.placement import resolve_device
    from fastgpt.quant.verify import verify as check

    for line in check(path, source, None if device is None else resolve_device(device)):
        typer.echo(line)
