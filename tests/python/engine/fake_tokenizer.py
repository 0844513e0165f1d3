"""A byte-level tokenizer without merges, in R1's chat format, made in memory."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fastgpt.tokenizer import TokenizerFiles
from fastgpt.tokenizer.detokenizer import byte_level_alphabet

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content | trim }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ opening }}{% endif %}"
)


def make_files(opening: str = "<think>\n", **generation_config: object) -> TokenizerFiles:
    """Return a tokenizer of 256 bytes and six added tokens, ids 0..5 first."""
    added = [BOS, EOS, USER, ASSISTANT, "<think>", "</think>"]
    vocab = {token: i for i, token in enumerate(added)}
    for char, byte in byte_level_alphabet().items():
        vocab[char] = len(added) + byte
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in added[:2]])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added[2:]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config={"bos_token": BOS, "eos_token": EOS, "add_bos_token": True},
        chat_template=TEMPLATE.replace("{{ opening }}", opening),
        generation_config=json.loads(json.dumps(generation_config)),
    )


def byte_ids(data: bytes) -> list[int]:
    """Return the ids of plain bytes."""
    return [6 + byte for byte in data]
