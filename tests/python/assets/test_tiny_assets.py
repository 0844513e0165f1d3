"""The bundled checkpoints: what they claim to be, and that they still solve held-out problems."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import train_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_networks import CONFIGS, TinyCausalLM, import_state
from tiny_tasks import (
    MAX_STEPS,
    MIN_STEPS,
    TASKS,
    Problem,
    check_answer,
    count_problems,
    draw_problems,
    is_held_out,
)
from tiny_tokenizer import build_tokenizer, prompt_text
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(train_tiny.__file__).parents[1] / "fastgpt" / "assets"
MODELS = ("tiny-r1", "tiny-qwen")
BYTES_AT_MOST = {"tiny-r1": 16e6, "tiny-qwen": 8e6}
SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small run fastest on one thread, and by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load_json(name: str, file: str) -> dict:
    return json.loads((ASSETS / name / file).read_text(encoding="utf-8"))


def test_config_is_the_one_the_script_trains(name: str) -> None:
    assert load_json(name, "config.json") == CONFIGS[name]


def test_tiny_r1_config_runs_the_products_kernels() -> None:
    """Latent 512 + rope 64, a group limit that bites, and widths int4's groups of 128 divide."""
    config = load_json("tiny-r1", "config.json")
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    assert config["topk_group"] < config["n_group"]
    assert config["n_shared_experts"] == config["first_k_dense_replace"] == 1
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"):
        assert config[key] % 128 == 0, key


def test_weights_have_published_names_and_types(name: str) -> None:
    state = load_file(ASSETS / name / "model.safetensors")
    for key, tensor in state.items():
        is_bias = key.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), key
        assert bool(tensor.isfinite().all()), key
    if name == "tiny-r1":
        assert 3e6 <= sum(t.numel() for t in state.values()) <= 8e6
        assert state["model.layers.3.mlp.experts.7.down_proj.weight"].shape == (256, 128)
        for layer in (1, 2, 3):  # trained: a bias of zeros would hide an engine that ignores it
            bias = state[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
            assert float(bias.abs().max()) > 1e-3
    else:
        assert "lm_head.weight" not in state
        assert float(state["model.layers.0.self_attn.q_proj.bias"].abs().max()) > 1e-2
    size = sum(file.stat().st_size for file in (ASSETS / name).iterdir())
    assert size <= BYTES_AT_MOST[name]


def test_training_report_meets_the_bar(name: str) -> None:
    report = load_json(name, "training_report.json")
    assert report["weights_bytes"] == (ASSETS / name / "model.safetensors").stat().st_size
    assert set(report["tasks"]) == set(TASKS)
    for task, result in report["tasks"].items():
        assert result["n"] == 5000
        assert result["exact_match"] >= 0.98, task
        assert result["possible_problems_at_least"] == count_problems(task)


@given(text=st.text(max_size=60))
@settings(max_examples=200)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    for model in MODELS:
        tokenizer = _tokenizer(model)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def _tokenizer(name: str, known: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006 (a cache)
    if name not in known:
        known[name] = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    return known[name]


def test_tokenizer_gives_digits_and_marks_one_token_each(name: str) -> None:
    tokenizer = _tokenizer(name)
    assert [tokenizer.token_to_id(t) for t in (*SPECIALS, *MARKS)] == list(range(7))
    assert len(tokenizer.encode("".join(MARKS), add_special_tokens=False).ids) == len(MARKS)
    for token in tokenizer.get_vocab():
        assert not (len(token) > 1 and any(c in "0123456789" for c in token)), token
    plain = AutoTokenizer.from_pretrained(ASSETS / name)
    text = "Größe 東京 👩\u200d🚀 ½ \x00\t\r\n 12345 <｜User｜>"
    assert plain.decode(plain(text, add_special_tokens=False).input_ids) == text
    assert plain("7").input_ids == [0, tokenizer.token_to_id("7")]


def test_tokenizer_is_what_the_script_builds(name: str) -> None:
    built = build_tokenizer(load_json(name, "training_report.json")["seed"])
    assert json.loads(built.to_str()) == load_json(name, "tokenizer.json")


def test_chat_template_renders_r1s_format(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)

    def render(*messages: tuple[str, str], generate: bool = True) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)

    assert render(("user", "2+2?")) == prompt_text("2+2?")
    assert (
        render(("user", "2+2?")) == "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n"
    )
    assert render(
        ("user", "a"), ("system", "Be brief."), ("assistant", "why\n</think>\n\nb"), ("user", "c")
    ) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>a<｜Assistant｜>\n\nb<｜end▁of▁sentence｜>"
        "<｜User｜>c<｜Assistant｜><think>\n"
    )
    assert render(("user", "a"), generate=False) == "<｜begin▁of▁sentence｜><｜User｜>a"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert ids.count(0) == 1, "exactly one BOS"


def solve(question: str) -> str:
    """Answer a question by plain computation, apart from the code that wrote it."""
    numbers = [int(n) for n in re.findall(r"(?:with|add|subtract|by) (\d+)", question)]
    if question.startswith("Start"):
        value = numbers[0]
        words = re.findall(r"add|subtract|multiply", question)
        for word, number in zip(words, numbers[1:], strict=True):
            value = {
                "add": value + number,
                "subtract": value - number,
                "multiply": value * number,
            }[word]
        return str(value)
    if question.startswith("Which"):
        items = {int(value): label for label, value in re.findall(r"([A-I])=(\d+)", question)}
        return items[max(items) if "largest" in question else min(items)]
    values = sorted(map(int, re.findall(r"\d+", question)), reverse="from largest" in question)
    return ", ".join(map(str, values))


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_right_and_chains_have_two_to_eight_steps(task: str) -> None:
    lengths = set()
    for problem in draw_problems(task, 500, seed=5, held_out=True):
        assert solve(problem.question) == problem.answer
        assert check_answer(problem, problem.response)
        assert not check_answer(problem, problem.reasoning)
        assert not check_answer(problem, problem.response + "0")
        lengths.add(len(problem.reasoning.splitlines()))
        if task == "arithmetic":
            for line in problem.reasoning.splitlines():
                _, chain = line.split(") ")
                assert len({eval(side) for side in chain.split("=")}) == 1, line
    assert lengths == set(range(MIN_STEPS, MAX_STEPS + 1))


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_problem_is_trained_on(task: str) -> None:
    assert count_problems(task) >= 10**6
    trained = {p.question for p in draw_problems(task, 5000, seed=20261123000, held_out=False)}
    held_out = {p.question for p in draw_problems(task, 2000, seed=20261125, held_out=True)}
    assert len(held_out) == 2000
    assert not trained & held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, trained))


@pytest.mark.usefixtures("one_thread")
def test_greedy_answers_are_right_in_transformers(name: str) -> None:
    """Six held-out problems of a seed that training's report did not use."""
    problems = [p for task in TASKS for p in draw_problems(task, 2, seed=99, held_out=True)]
    texts = _generate(name, problems)
    assert [check_answer(p, t) for p, t in zip(problems, texts, strict=True)] == [True] * 6


def _generate(name: str, problems: list[Problem]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    batch = tokenizer(
        [prompt_text(p.question) for p in problems],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    output = model.generate(**batch, max_new_tokens=240, do_sample=False, top_p=None)
    responses = output[:, batch.input_ids.shape[1] :]
    return [tokenizer.decode(r, skip_special_tokens=False).split(SPECIALS[1])[0] for r in responses]


@pytest.mark.usefixtures("one_thread")
def test_training_network_equals_transformers(name: str) -> None:
    """fp32 logits agree, and stop agreeing when the rotary base changes, so the check can fail."""
    assert train_tiny.compare_with_transformers(ASSETS / name, name) < 1e-5
    state = load_file(ASSETS / name / "model.safetensors")
    ids = torch.arange(60)[None]
    logits = []
    for theta in (10000, 20000):
        model = TinyCausalLM({**CONFIGS[name], "rope_theta": theta}).eval()
        import_state(model, state)
        with torch.inference_mode():
            logits.append(model.lm_head(model(ids)))
    assert float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) > 1e-2
