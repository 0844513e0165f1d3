"""The tokenizer and chat template of tiny-r1 and tiny-qwen: byte-level BPE in R1's chat format."""

from __future__ import annotations

import json

from tiny_networks import VOCAB_SIZE
from tiny_tasks import TASKS, Problem, draw_problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = [
    "BOS",
    "BOS_ID",
    "CHAT_TEMPLATE",
    "EOS",
    "EOS_ID",
    "PAD",
    "PAD_ID",
    "build_tokenizer",
    "encode_problems",
    "prompt_text",
]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

# R1's format: one BOS, system text in front, earlier turns without their reasoning.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{{- '\n\n' if not loop.first -}}{{- message['content'] -}}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<｜User｜>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}"
)


def prompt_text(question: str) -> str:
    """Return what CHAT_TEMPLATE renders for one user message."""
    return f"{BOS}{USER}{question}{ASSISTANT}{THINK}\n"


def build_tokenizer(seed: int) -> Tokenizer:
    """Return a byte-level BPE of at most VOCAB_SIZE tokens: specials, 256 bytes, learnt merges.

    Digits are split off one by one, so each is one token; any UTF-8 text survives a round trip.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    specials = [BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    texts = []
    for task in TASKS:
        for p in draw_problems(task, 2000, seed=seed, held_out=False):
            texts += [p.question, *p.response.split(END_THINK)]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(m) for m in model["merges"]]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    # As in R1's tokenizer: the chat and thinking marks are single tokens, yet no "special" ones.
    for text in specials:
        token = AddedToken(text, normalized=False, special=text in (BOS, EOS, PAD))
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def encode_problems(
    tokenizer: Tokenizer, problems: list[Problem]
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, response ids with the end token) of each problem.

    Encoded apart, because at generation the prompt's last token never merges with what follows.
    """
    prompts = tokenizer.encode_batch(
        [prompt_text(p.question) for p in problems], add_special_tokens=False
    )
    responses = tokenizer.encode_batch(
        [p.response + EOS for p in problems], add_special_tokens=False
    )
    return [(p.ids, r.ids) for p, r in zip(prompts, responses, strict=True)]
