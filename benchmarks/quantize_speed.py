"""How long quantizing takes and how much device memory, on random weights of public shapes.

    python benchmarks/quantize_speed.py --shape r1-llama-8b --method fp8 --layers 4
    python benchmarks/quantize_speed.py --shape r1-llama-70b --method gptq --memory

The checkpoint is made on the device and lies in memory (--folder), so files are read from the page
cache and written to it. Time is measured with --layers of the layers and with one; what all of them
take follows from the difference and is marked as scaled, but where --layers is all. Methods:

    fp8    fp8 for every layer's matrices, no data
    int4   int4 with searched scales, no data
    clip   the same by the error of outputs on --num-sequences x --length given tokens
    gptq   int4 with GPTQ, on as many tokens (random ones: time does not depend on what they say)

--memory measures the peak of device memory, by 4 and 8 layers, instead. Random weights say
nothing of quality, so no error is printed.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, write_checkpoint

from fastgpt.checkpoint.writer import ContainerWriter
from fastgpt.quant import Calibration, Quantizer, family, gptq, layerwise, run, search
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.observe import HiddenStates
from fastgpt.quant.ranges import ActivationRanges

_CLIP = {"format": "int4", "algorithm": "clip"}
METHODS: dict[str, Any] = {
    "fp8": "fp8",
    "int4": "int4",
    "clip": {"attention_weights": _CLIP, "residual_connections": _CLIP},
    "gptq": "int4",
}
_WARM_UP = 8  # sequences
TARGET_S = {"fp8": 15.0, "int4": 40.0, "gptq": 240.0}  # of the 8B shape on an H200


class PeakMemory:
    """The most device memory in use, by whomever, sampled every two milliseconds."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        torch.cuda.empty_cache()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            free, total = torch.cuda.mem_get_info()
            self.peak_bytes = max(self.peak_bytes, total - free)
            time.sleep(0.002)


@contextmanager
def checkpoint(args: argparse.Namespace, num_layers: int) -> Iterator[Path]:
    """Write a checkpoint of the shape with that many layers; delete it afterwards."""
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="fastgpt-"))
    start = time.monotonic()
    try:
        config = {**SHAPES[args.shape], "num_hidden_layers": num_layers}
        num_bytes = write_checkpoint(folder / "source", config, torch.device(args.device))
        elapsed = time.monotonic() - start
        print(f"{num_layers} layers, {num_bytes / 1e9:.2f} GB made in {elapsed:.1f} s", flush=True)
        yield folder
    finally:
        shutil.rmtree(folder)


def quantize(args: argparse.Namespace, folder: Path, num_sequences: int) -> float:
    """Quantize once, with that many sequences where tokens are used; return the seconds."""
    calibration = None
    if args.method in {"clip", "gptq"}:
        generator = torch.Generator().manual_seed(0)
        shape = (num_sequences, args.length)
        vocab = SHAPES[args.shape]["vocab_size"]
        tokens = torch.randint(vocab, shape, generator=generator).tolist()
        calibration = Calibration(
            tokens,
            num_sequences=num_sequences - args.num_evaluation,
            num_evaluation=args.num_evaluation,
        )
    start = time.monotonic()
    quantizer = Quantizer(
        folder / "source", METHODS[args.method], calibration=calibration, device=args.device
    )
    quantizer.write(folder / "m.pt", progress=False)
    return time.monotonic() - start


# What the main thread does for a tensor or a block: module or class, function. Behind a point: a
# part of the stage above it.
STAGES = {
    "read the source": (family, "_read"),
    "observe": (HiddenStates, "observe_layer"),
    ". its weights": (HiddenStates, "_load"),
    ". layers, Gram matrices with": (HiddenStates, "_move"),
    ".. Gram matrices": (InputStats, "add"),
    "search": (family, "quantize_layer"),
    ". scale of a norm": (layerwise, "_best_scale"),
    ". clipped grids": (search, "clipped_grid"),
    ". nearest codes": (search, "encode"),
    ". GPTQ": (search, "gptq_codes"),
    ".. its factor": (gptq, "_upper_factor"),
    ". packing": (search, "pack_codes"),
    ". errors of outputs": (search, "_energies"),
    "round": (family, "round_tensor"),
    "choose": (family, "choose"),
    "errors": (family, "squared_errors"),
    "advance": (HiddenStates, "advance"),
    ". ranges": (ActivationRanges, "add"),
    "take to the host": (family, "on_host"),
    "hand to the writer": (ContainerWriter, "add"),
    "wait for hashes and disk": (run, "_note"),
    "finish the file": (ContainerWriter, "finish"),
}


@contextmanager
def profiled(is_wanted: bool) -> Iterator[None]:
    """Print the seconds that the main thread spends in each stage, the device waited for."""
    seconds: Counter[str] = Counter()
    originals = {}

    def timed(stage: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            torch.cuda.synchronize()
            start = time.monotonic()
            result = function(*args, **options)
            torch.cuda.synchronize()
            seconds[stage] += time.monotonic() - start
            return result

        return call

    for stage, (owner, name) in STAGES.items() if is_wanted else ():
        originals[stage] = getattr(owner, name)
        setattr(owner, name, timed(stage, originals[stage]))
    start = time.monotonic()
    try:
        yield
    finally:
        for stage, function in originals.items():
            setattr(*STAGES[stage], function)
    if is_wanted:
        print(f"stages of {time.monotonic() - start:.2f} s, the device waited for:")
        for stage in STAGES:
            print(f"  {stage:26}{seconds[stage]:8.3f} s")


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of one layer and of --layers, and what all would take."""
    seconds = {}
    all_layers = SHAPES[args.shape]["num_hidden_layers"]
    with checkpoint(args, 1) as folder:
        quantize(args, folder, _WARM_UP)  # kernels and libraries are loaded
    is_measured = all_layers == args.layers
    for num_layers in (args.layers,) if args.profile or is_measured else (1, args.layers):
        with checkpoint(args, num_layers) as folder, profiled(args.profile):
            seconds[num_layers] = quantize(args, folder, args.num_sequences)
        print(f"{num_layers} layers: measured {seconds[num_layers]:.2f} s", flush=True)
    if len(seconds) == 1:
        return {"measured_s": seconds, "is_scaled": False}
    each = (seconds[args.layers] - seconds[1]) / (args.layers - 1)
    scaled = seconds[1] + each * (all_layers - 1)
    print(
        f"{args.shape} {args.method}: {each:.3f} s a layer, {seconds[1] - each:.2f} s besides; "
        f"all {all_layers} layers {scaled:.1f} s (scaled)"
    )
    return {
        "layer_s": each,
        "besides_s": seconds[1] - each,
        "model_s": scaled,
        "is_scaled": True,
        "measured_s": seconds,
        "target_s": TARGET_S.get(args.method) if args.shape == "r1-llama-8b" else None,
    }


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the peak of device memory with each number of layers."""
    peaks: dict[int, int] = {}
    for num_layers in args.memory:
        with checkpoint(args, num_layers) as folder, PeakMemory() as memory:
            torch.cuda.reset_peak_memory_stats()
            seconds = quantize(args, folder, args.num_sequences)
            by_torch = torch.cuda.max_memory_allocated() / 1e9
        peaks[num_layers] = memory.peak_bytes
        print(
            f"{num_layers} layers: peak {memory.peak_bytes / 1e9:.3f} GB of device memory, "
            f"CUDA context included ({by_torch:.3f} GB of it torch's tensors), {seconds:.1f} s",
            flush=True,
        )
    for num_layers in args.memory[1:]:
        more = 100 * (peaks[num_layers] / peaks[args.memory[0]] - 1)
        print(f"{num_layers} layers' peak: {more:+.2f} % of that of {args.memory[0]}")
    return {"peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="r1-llama-8b")
    parser.add_argument("--method", choices=METHODS, default="fp8")
    parser.add_argument("--layers", type=int, default=4, help="all of them: measured, not scaled")
    parser.add_argument("--num-sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--num-evaluation", type=int, default=0, help="of them, to measure with")
    parser.add_argument("--memory", type=int, nargs="*", help="with these layers; 4 and 8")
    parser.add_argument("--profile", action="store_true", help="of --layers alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default="/dev/shm")
    args = parser.parse_args()
    if args.memory == []:
        args.memory = [4, 8]
    if args.layers < 2 and not args.profile:
        parser.error("--layers is the second of two points: give 2 or more")
    on_gpu = torch.device(args.device).type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(f"{machine}, torch {torch.__version__}: {' '.join(sys.argv)}")
    result = measure_memory(args) if args.memory is not None else measure_time(args)
    print(json.dumps({"machine": machine, **vars(args), **result}))


if __name__ == "__main__":
    main()
