"""The parity check must fail for each of ten mistakes that a port of these models can make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_parity import TOLERANCE
from tiny_models import (
    CASES,
    Runner,
    Step,
    our_model,
    prompts_for,
    reference_logits,
    reference_model,
    worst_error,
)

from fastgpt import ops
from fastgpt.models.model import Model


def rope(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["rope_parameters"].update(changes)


def config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update(changes)


def drop_qkv_bias(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.endswith("_proj.bias")]:
        weights[name] = torch.zeros_like(weights[name])


def bias_in_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weigh experts by the biased scores: what V3 calls the choice."""
    route = ops.moe_route

    def wrong(logits: torch.Tensor, bias: torch.Tensor, top_k: int, **options: Any) -> Any:
        ids, _ = route(logits, bias, top_k, **options)
        weights = (logits.sigmoid() + bias).gather(1, ids.long())
        weights /= weights.sum(-1, keepdim=True)
        return ids, weights * options["scaling"]

    monkeypatch.setattr(ops, "moe_route", wrong)


class OffByOne(Runner):
    """Positions count from 1 (rotary angles of a rotation by one more step differ in YaRN only by
    what is cached: the shift is applied from the second chunk on, as a cache bug would)."""

    def batch(self, steps):  # type: ignore[no-untyped-def]
        shifted = any(self.lengths[step.request] for step in steps)
        batch = super().batch(steps)
        if shifted:
            batch.positions += 1
        return batch


def error_of(reference: Any, model: Model, runner: type[Runner] = Runner) -> float:
    (prompt,) = prompts_for(model.vocab_size, [48])
    steps = runner(model, 1, len(prompt))
    got = [steps.run([Step(0, piece)])[0] for piece in (prompt[:30], prompt[30:])]
    return worst_error(torch.cat(got), reference_logits(reference, prompt))


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("qwen2", {"edit_config": rope(rope_theta=1.01e6)}),
    "eps": ("llama", {"edit_config": config(rms_norm_eps=1.2e-5)}),
    "rope_interleave": ("v3", {"edit_config": config(rope_interleave=False)}),
    "mscale": ("v3", {"edit_config": rope(mscale_all_dim=1.31)}),
    "routed_scaling": ("v3", {"edit_config": config(routed_scaling_factor=2.51)}),
    "group_limit": ("v2", {"edit_config": config(topk_method="greedy")}),
    "correction_bias": ("v3", {}),
    "qkv_bias": ("qwen2", {"edit_weights": drop_qkv_bias}),
    "tied_head": ("qwen3", {"edit_config": config(tie_word_embeddings=True)}),
    "position": ("llama", {}),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {
        name: reference_model(CASES[name].hf_config)
        for name in sorted({base for base, _ in MUTANTS.values()})
    }


@pytest.mark.parametrize("base", sorted({base for base, _ in MUTANTS.values()}))
def test_unchanged_model_passes(references: dict[str, Any], base: str) -> None:
    assert error_of(references[base], our_model(references[base])) <= TOLERANCE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_fails_parity(
    references: dict[str, Any], mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, edits = MUTANTS[mutant]
    if mutant == "correction_bias":
        bias_in_weights(monkeypatch)
    model = our_model(references[base], **edits)
    runner = OffByOne if mutant == "position" else Runner
    error = error_of(references[base], model, runner)
    assert error > 3 * TOLERANCE, f"the check misses a wrong {mutant}: error {error:.1e}"
