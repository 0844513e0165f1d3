"""The article's own snippets, as written; only file names and `weights_only=False` differ.

The server's part starts from the file that the quantizer snippet writes, `deepseek_r1_quant.pt`.
"""

import sys
from pathlib import Path

import pytest
import torch
from server.serving import Served
from transformers import AutoModelForCausalLM

import fastgpt
from fastgpt.checkpoint import Container

sys.path.append(str(Path(__file__).parent / "models"))
from tiny_models import CASES, reference_model

QUANTIZE = """
from fastgpt import Quantizer
# 加载原始模型
model = torch.load('deepseek_r1_fp32.pt', weights_only=False)
# 配置量化参数
quant_config = {
    'attention_weights': 'fp8',
    'residual_connections': 'int4',
    'norm_params': 'binary'
}
# 执行量化
quantizer = Quantizer(model, config=quant_config)
quantized_model = quantizer.convert()
quantized_model.save('deepseek_r1_quant.pt')
"""

YAML = """
# fastgpt_config.yaml
service:
  port: 8080
  batch_size: 32
  max_length: 2048
hardware:
  gpu_id: 0
  memory_pool_size: 24GB # 推荐显存的90%
optimization:
  async_pipeline: true
  precision: mixed
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the pickled float32 module the article starts from, and its tokenizer."""
    model = reference_model(CASES["v3"].hf_config)
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "tokenizer.json").write_text('{"version": "1.0"}')
    model.name_or_path = str(tmp_path / "r1")
    torch.save(model, tmp_path / "deepseek_r1_fp32.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_article_quantizer_snippet(workdir: Path, capsys):
    exec(compile(QUANTIZE, "article", "exec"), {"torch": torch})
    assert "norm_params" in capsys.readouterr().out
    opened = Container("deepseek_r1_quant.pt")
    kinds = {r.format["format"] for r in opened.metadata.tensors.values()}
    assert {"fp8", "int4", "binary", "fp16"} <= kinds
    assert opened.tokenizer_json == '{"version": "1.0"}'
    report = opened.metadata.report
    assert report["before_bytes"] / report["after_bytes"] > 4


def test_article_configuration_file(tmp_path: Path):
    from fastgpt.config import ServerConfig

    (tmp_path / "fastgpt_config.yaml").write_text(YAML)
    config = ServerConfig.from_yaml(tmp_path / "fastgpt_config.yaml", {})
    assert (config.service.port, config.service.batch_size) == (8080, 32)
    assert config.service.max_length == 2048


def test_article_server_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The quantizer snippet, the YAML and the command, one after the other, on tiny-r1."""
    source = Path(fastgpt.__file__).parent / "assets" / "tiny-r1"
    model = AutoModelForCausalLM.from_pretrained(source)
    monkeypatch.chdir(tmp_path)
    torch.save(model, "deepseek_r1_fp32.pt")
    exec(compile(QUANTIZE, "article", "exec"), {"torch": torch})
    command = "--config fastgpt_config.yaml --model deepseek_r1_quant.pt --log-level debug"
    for port in ("8080", "0"):  # any port, where somebody else serves on the article's
        Path("fastgpt_config.yaml").write_text(YAML.replace("8080", port))
        server = Served(["-m", "fastgpt.cli.serve", *command.split()], tmp_path / "log")
        try:
            server.wait_ready()
            break
        except AssertionError:
            if port == "0" or "port 8080: address already in use" not in server.log.read_text():
                raise
    with server as served:
        question = "Start with 68. 1) add 57 2) add 94. What is the result?"
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 200,
            "temperature": 0,
        }
        answer = served.post("v1/chat/completions", json=body).json()
        assert answer["model"] == "deepseek_r1_quant"
        assert answer["choices"][0]["finish_reason"] == "stop"
        message = answer["choices"][0]["message"]
        assert message["reasoning_content"]
        assert message["content"].strip() == str(68 + 57 + 94)
    assert "/v1/chat/completions" in (tmp_path / "log").read_text()
