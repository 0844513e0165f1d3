"""Our models against transformers in float32: the same logits whatever the batching."""

import pytest
import torch
from tiny_models import (
    CASES,
    SWEEP,
    Runner,
    Step,
    our_model,
    prompts_for,
    reference_logits,
    reference_model,
    worst_error,
)

# Both sides sum float32 products of a few hundred terms in their own order.
TOLERANCE = 1e-5

LENGTHS = (37, 1, 20, 64)


def check_parity(reference, model) -> None:
    prompts = prompts_for(model.vocab_size, LENGTHS)
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    assert_whole_prompt(model, prompts, expected)
    assert_chunked(model, prompts, expected)
    assert_mixed(model, prompts, expected)


def assert_close(actual, expected, what: str) -> None:
    error = worst_error(actual, expected)
    assert error <= TOLERANCE, f"{what}: error {error:.2e} of the largest logit"


def assert_whole_prompt(model, prompts, expected) -> None:
    for prompt, want in zip(prompts, expected, strict=True):
        (got,) = Runner(model, 1, len(prompt)).run([Step(0, prompt)])
        assert_close(got, want, f"whole prompt of {len(prompt)}")


def assert_chunked(model, prompts, expected) -> None:
    """Prefill in chunks of 7, then decode the last ten tokens one by one."""
    for prompt, want in zip(prompts, expected, strict=True):
        runner = Runner(model, 1, len(prompt))
        split = max(0, len(prompt) - 10)
        pieces = [prompt[i : min(i + 7, split)] for i in range(0, split, 7)]
        pieces += [[token] for token in prompt[split:]]
        got = torch.cat([runner.run([Step(0, piece)])[0] for piece in pieces])
        assert_close(got, want, f"chunks, then decode, of {len(prompt)}")


def assert_mixed(model, prompts, expected) -> None:
    """All requests in ragged batches: chunks of unequal length beside single tokens."""
    runner = Runner(model, len(prompts), max(map(len, prompts)))
    got = [[] for _ in prompts]
    sizes = (5, 1, 1, 13)
    while True:
        steps = []
        for r, prompt in enumerate(prompts):
            start = runner.lengths[r]
            if start < len(prompt):
                steps.append(Step(r, prompt[start : start + sizes[r]]))
        if not steps:
            break
        for step, logits in zip(steps, runner.run(steps), strict=True):
            got[step.request].append(logits)
    for r, want in enumerate(expected):
        assert_close(torch.cat(got[r]), want, f"mixed batch, request {r}")


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    reference = reference_model(CASES[request.param].hf_config)
    return reference, our_model(reference)


def test_logits_match_transformers(pair) -> None:
    check_parity(*pair)


# A differing token is excused only where the reference cannot tell its two best apart.
EXCUSED_MARGIN = 2e-5


def test_greedy_text_matches_transformers(pair) -> None:
    """64 tokens, one by one, from our own cache; the reference reads the whole text at once."""
    reference, model = pair
    (prompt,) = prompts_for(model.vocab_size, [9], seed=11)
    runner = Runner(model, 1, len(prompt) + 64)
    (logits,) = runner.run([Step(0, prompt)])
    text = list(prompt)
    for _ in range(64):
        text.append(int(logits[-1].argmax()))
        (logits,) = runner.run([Step(0, text[-1:])])
    expected = reference_logits(reference, text)
    for i in range(len(prompt) - 1, len(text) - 1):
        best = expected[i].topk(2)
        if text[i + 1] != int(best.indices[0]):
            margin = float(best.values[0] - best.values[1])
            limit = EXCUSED_MARGIN * float(expected[i].abs().max())
            assert margin < limit, f"token {i + 1} differs at a margin of {margin:.2e}"
            break  # after an excused difference both texts go their own way


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEP)
def test_logits_match_transformers_in_odd_shapes(name: str) -> None:
    reference = reference_model(SWEEP[name].hf_config, seed=2)
    check_parity(reference, our_model(reference))
