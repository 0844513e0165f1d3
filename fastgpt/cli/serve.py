"""`fastgpt serve`, also installed as `fastgpt-server`."""

from pathlib import Path
from typing import Annotated

import typer

from fastgpt import env, logging
from fastgpt.config import ServerConfig
from fastgpt.errors import FastGPTError

__all__ = ["main", "serve"]


def serve(
    model: Annotated[
        str, typer.Option(help="A FastGPT file, a Hugging Face directory or a GGUF file.")
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file; flags win over it.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory with tokenizer.json; default: the model's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: activations and cache.")
    ] = "auto",
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    host: Annotated[str | None, typer.Option(help="service.host [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="service.port [8080]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="service.batch_size [32]")] = None,
    max_length: Annotated[int | None, typer.Option(help="service.max_length [2048]")] = None,
    min_batch: Annotated[int | None, typer.Option(help="service.min_batch [1]")] = None,
    batch_timeout: Annotated[str | None, typer.Option(help="service.batch_timeout [100ms]")] = None,
    num_workers: Annotated[int | None, typer.Option(help="service.num_workers [4]")] = None,
    gpu_id: Annotated[int | None, typer.Option(help="hardware.gpu_id [0]")] = None,
    memory_pool_size: Annotated[
        str | None, typer.Option(help="hardware.memory_pool_size [0.9]: 24GB, 24GiB, 0.9, -2GiB")
    ] = None,
    swap_to_cpu: Annotated[
        bool | None,
        typer.Option("--swap-to-cpu", help="hardware.swap_to_cpu [false]: serve what does not fit"),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="optimization.precision [mixed]")] = None,
    warmup_iterations: Annotated[
        int | None, typer.Option(help="optimization.warmup_iterations [5]")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="optimization.kv_cache_dtype [auto]: auto, fp8 or int8")
    ] = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's form."""
    overrides = {
        "service.host": host,
        "service.port": port,
        "service.batch_size": batch_size,
        "service.max_length": max_length,
        "service.min_batch": min_batch,
        "service.batch_timeout": batch_timeout,
        "service.num_workers": num_workers,
        "hardware.gpu_id": gpu_id,
        "hardware.memory_pool_size": memory_pool_size,
        "hardware.swap_to_cpu": swap_to_cpu,
        "optimization.precision": precision,
        "optimization.warmup_iterations": warmup_iterations,
        "optimization.kv_cache_dtype": kv_cache_dtype,
    }
    try:
        level = (log_level or env.log_level()).lower()
        logging.setup(level)
        settings = ServerConfig.from_yaml(config, overrides)
        from fastgpt.server.serve import ServeOptions, run_server

        run_server(
            settings,
            ServeOptions(
                model=model, tokenizer=tokenizer, device=device, dtype=dtype, log_level=level
            ),
        )
    except FastGPTError as error:
        typer.echo(f"fastgpt-server: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of `fastgpt-server`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="fastgpt-server")(serve)
    app()


if __name__ == "__main__":
    main()
