"""int8 from the policy's key to the engine: quantize, save, load, answer."""

from pathlib import Path

import fastgpt
from fastgpt import Engine, Quantizer, SamplingParams
from fastgpt.checkpoint import Container

MODEL = Path(fastgpt.__file__).parent / "assets" / "tiny-r1"
QUESTIONS = [
    f"Start with {68 + 7 * i}. 1) add {57 - i} 2) add {94 + i}. What is the result?"
    for i in range(2)
]


def test_a_model_in_int8_answers_like_its_source(tmp_path: Path) -> None:
    path = tmp_path / "int8.pt"
    roles = ("attention_weights", "residual_connections", "io_layers")
    Quantizer(MODEL, dict.fromkeys(roles, "int8")).convert(progress=False).save(path)
    stored = {
        record.format["format"]
        for name, record in Container(path).metadata.tensors.items()
        if name.endswith(("proj.weight", "head.weight", "tokens.weight"))
    }
    assert stored == {"int8"}
    params = SamplingParams(temperature=0.0, max_tokens=256)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = []
    for model in (MODEL, path):
        engine = Engine(model, device="cpu", max_length=512, memory_pool_size="1GB")
        answers.append([output.text for output in engine.generate(chats, params)])
    for i, answer in enumerate(answers[1]):
        assert str(219 + 7 * i) in answer.splitlines()[-1], answer
    assert answers[0] == answers[1]
