"""Every kind of input gives the same file; tokenizer and settings travel; mistakes are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt.checkpoint import Container
from fastgpt.checkpoint.experts import split_names
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.quant import Quantizer
from fastgpt.scheme import QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model, worst_error

ARTICLE = {"attention_weights": "fp8", "residual_connections": "int4", "norm_params": "binary"}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


@pytest.fixture(scope="module")
def reference():
    return reference_model(CASES["v3"].hf_config)


@pytest.fixture(scope="module")
def directory(reference, tmp_path_factory) -> Path:
    """A Hugging Face directory as transformers writes it, with a tokenizer."""
    path = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    return path


def contents(path: Path) -> dict:
    opened = Container(path)
    return {name: record.parts for name, record in opened.metadata.tensors.items()}


def test_quantizer_gives_the_same_weights_from_every_input(reference, directory, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "state.pt")
    sources = {
        "directory": Quantizer(directory, ARTICLE, calibration=None),
        "module": Quantizer(reference, ARTICLE, calibration=None),
        "pickle": Quantizer(
            tmp_path / "state.pt", ARTICLE, model_config=str(directory), calibration=None
        ),
    }
    files = {}
    for name, quantizer in sources.items():
        quantizer.convert(progress=False).save(tmp_path / f"{name}.pt")
        files[name] = contents(tmp_path / f"{name}.pt")
    assert len(files["module"]) > 100
    assert files["directory"] == files["module"] == files["pickle"]
    kinds = {
        r.format["format"] for r in Container(tmp_path / "module.pt").metadata.tensors.values()
    }
    assert kinds == {"fp8", "int4", "binary", "fp16", "fp32"}


@pytest.mark.parametrize("family", ["qwen2", "v3"])
def test_quantized_model_answers_as_its_stored_weights(family: str, tmp_path):
    """The object of convert and the loaded file run, equal to transformers on the same values."""
    reference = reference_model(CASES[family].hf_config)
    ids = torch.randint(100, (2, 19), generator=torch.Generator().manual_seed(4))
    quantized = Quantizer(reference, calibration=None).convert(progress=False)
    quantized.save(tmp_path / "m.pt")
    loaded = fastgpt.load(tmp_path / "m.pt", device="cpu", dtype="float32")
    with torch.no_grad():
        before = reference(ids).logits
        for name, target in reference.state_dict().items():
            places = dict(split_names(name, tuple(target.shape)))
            for part, place in places.items():
                place.of(target).copy_(stored_value(quantized, part))
            if not places:
                target.copy_(stored_value(quantized, name))
        expected = reference(ids).logits
    assert worst_error(loaded(ids), expected) < 1e-5
    # Activations may be bf16, and a token of the mixture may then go to another expert.
    each = [worst_error(a, b) for a, b in zip(quantized(ids)[0], expected[0], strict=True)]
    assert sorted(each)[len(each) // 2] < 5e-2
    assert worst_error(expected, before) > 1e-3  # quantizing changed the model at all
    loaded.save(tmp_path / "again.pt")
    assert contents(tmp_path / "again.pt") == contents(tmp_path / "m.pt")


def stored_value(quantized, name: str) -> torch.Tensor:
    stored = quantized.checkpoint.read(name)
    return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()


def test_quantizer_streams_the_file_that_convert_saves(directory, tmp_path):
    quantizer = Quantizer(directory, calibration=None)
    quantizer.convert(progress=False).save(tmp_path / "a.pt")
    quantizer.write(tmp_path / "b.pt", progress=False)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_quantizer_takes_its_own_file(directory, tmp_path):
    """Quantizing again with formats that hold their own values exactly changes nothing."""
    Quantizer(directory, {"io_layers": "fp16"}).write(tmp_path / "a.pt", progress=False)
    Quantizer(tmp_path / "a.pt", {"io_layers": "fp16"}).write(tmp_path / "b.pt", progress=False)
    assert contents(tmp_path / "a.pt") == contents(tmp_path / "b.pt")


def test_quantizer_carries_tokenizer_and_settings(reference, directory, tmp_path):
    quantized = Quantizer(directory, calibration=None).convert(progress=False)
    quantized.save(tmp_path / "m.pt")
    opened = Container(tmp_path / "m.pt")
    assert json.loads(opened.tokenizer_json) == TOKENIZER
    assert opened.chat_template == "{{ messages }}"
    assert opened.generation_config == {"temperature": 0.6}
    assert opened.config["model_type"] == "deepseek_v3"
    report = opened.metadata.report
    assert report["after_bytes"] < report["before_bytes"] / 3
    assert report == quantized.report.to_json()

    Quantizer(reference, tokenizer=directory, calibration=None).convert(progress=False).save(
        tmp_path / "n.pt"
    )
    assert json.loads(Container(tmp_path / "n.pt").tokenizer_json) == TOKENIZER
    Quantizer(reference, calibration=None).convert(progress=False).save(tmp_path / "o.pt")
    assert Container(tmp_path / "o.pt").tokenizer_json is None
    reference.name_or_path = str(directory)
    try:
        Quantizer(reference, calibration=None).convert(progress=False).save(tmp_path / "p.pt")
    finally:
        reference.name_or_path = ""
    assert json.loads(Container(tmp_path / "p.pt").tokenizer_json) == TOKENIZER


def test_quantizer_prints_bytes_by_format(directory, capsys):
    Quantizer(directory, ARTICLE, calibration=None).convert()
    out = capsys.readouterr().out
    for words in ("attention_weights", "fp8", "int4 g128", "binary", "io_layers", "times smaller"):
        assert words in out


def test_quantizer_dry_run_states_the_sizes_of_the_file(directory):
    quantizer = Quantizer(directory, calibration=None)
    planned = quantizer.dry_run()
    quantizer.convert(progress=False)
    by_role = {}
    for report in (planned, quantizer.report):
        for row in report.to_json()["rows"]:
            if row["role"] != "kept":  # routers grow to float32 when a norm folds into them
                by_role.setdefault((row["role"], row["format"]), []).append(row["after_bytes"])
    assert by_role
    assert all(len(sizes) == 2 and sizes[0] == sizes[1] for sizes in by_role.values()), by_role


def test_quantizer_mistakes_are_named(reference, directory, tmp_path):
    with pytest.raises(ConfigError, match="budget"):
        Quantizer(directory, budget=[4.5])
    with pytest.raises(ConfigError, match="need calibration data"):
        Quantizer(directory, budget="4.5bpw", calibration=None).convert(progress=False)
    with pytest.raises(ConfigError, match="calibration"):
        Quantizer(directory, calibration="text.txt")
    with pytest.raises(ConfigError, match=r"expected an nn\.Module or a path"):
        Quantizer(3)
    with pytest.raises(CheckpointError, match="does not exist"):
        Quantizer(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Quantizer(directory, tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="model_config is for a pickled"):
        Quantizer(directory, model_config={})


def test_calibration_text_must_be_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    asset = Path(fastgpt.__file__).parent / "assets/tiny-qwen"
    quantizer = Quantizer(asset, calibration=tmp_path / "latin.txt")
    with pytest.raises(ConfigError, match=r"latin\.txt: calibration text is not UTF-8"):
        quantizer.convert(progress=False)


def test_quantizer_never_runs_a_pickle(reference, tmp_path):
    torch.save(reference, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"weights_only=False\) and pass the module"):
        Quantizer(tmp_path / "module.pt", model_config={})
    torch.save({"w": 3}, tmp_path / "dict.pt")
    with pytest.raises(CheckpointError, match="not a map of tensors"):
        Quantizer(tmp_path / "dict.pt", model_config={})
    torch.save({"w": torch.ones(2)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"config\.json beside it"):
        Quantizer(tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "module.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        Quantizer(tmp_path / "cut.pt", model_config={})


def run_cli(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastgpt.cli.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_cli_quantize_and_inspect(directory, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("attention_weights: fp8\noverrides:\n  lm_head: int4\n")
    done = run_cli("quantize", directory, "--output", tmp_path / "m.pt", "--policy", policy)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    shown = run_cli("inspect", tmp_path / "m.pt", "--tensors", "--verify")
    assert shown.returncode == 0, shown.stderr
    for words in ("DeepseekV3ForCausalLM", "chat template:", "lm_head.weight", "match their"):
        assert words in shown.stdout
    report = run_cli("inspect", tmp_path / "m.pt", "--report")
    assert json.loads(report.stdout)["after_bytes"] > 0


def test_cli_errors_are_one_line(directory, tmp_path):
    done = run_cli("quantize", directory, "--output", tmp_path / "m.pt", "--policy", "four_tier")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "did you mean 'four-tier'" in done.stderr
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("command", ["quantize", "inspect", "serve", "doctor"])
def test_cli_every_command_has_help(command: str):
    overview, own = run_cli("--help"), run_cli(command, "--help")
    assert command in overview.stdout
    assert own.returncode == 0, own.stderr
    assert command in own.stdout


def test_cli_starts_without_torch():
    code = "import sys, fastgpt.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
