"""The `fastgpt` command. Subcommands live in modules of their own and are imported when called."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperGroup

from fastgpt.errors import FastGPTError

__all__ = ["app"]

# Subcommand -> (module, what the overview says). The function has the subcommand's name.
_COMMANDS = {
    "quantize": ("fastgpt.cli.quantize", "Quantize a model into one file."),
    "inspect": ("fastgpt.cli.inspect", "Print what a model file holds."),
    "verify": ("fastgpt.cli.verify", "Check a model file against its certificate."),
    "serve": ("fastgpt.cli.serve", "Serve a model over HTTP, in OpenAI's form."),
    "doctor": ("fastgpt.cli.doctor", "Print versions, devices, kernels, and what is wrong."),
}


class _LazyGroup(TyperGroup):
    """A command group that imports a subcommand's module only to run it or to show its help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name, (module, _) in _COMMANDS.items() if find_spec(module)]

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.list_commands(ctx):
            return None
        module, _ = _COMMANDS[name]
        single = typer.Typer(add_completion=False)
        single.command(name=name)(getattr(import_module(module), name))
        command = typer.main.get_command(single)
        command.name = name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (FastGPTError, ImportError) as error:
            message = str(error)
        except BrokenPipeError:
            raise  # `fastgpt inspect m.pt | head`: the framework ends quietly
        except OSError as error:
            what = error.strerror or str(error)
            message = what if error.filename is None else f"{error.filename}: {what}"
        typer.echo(f"fastgpt: {message}", err=True)
        raise typer.Exit(1)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Quantize, inspect and serve DeepSeek-R1-family models.",
)


@app.callback()
def _root() -> None:
    """Quantize, inspect and serve DeepSeek-R1-family models."""


if __name__ == "__main__":
    app()
