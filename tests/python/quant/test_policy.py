"""The policy: who gets which format, and every mistake named."""

import pytest

from fastgpt.errors import ConfigError
from fastgpt.quant.policy import PRESETS, Parameter, Policy
from fastgpt.scheme import Format

ARTICLE = {"attention_weights": "fp8", "residual_connections": "int4", "norm_params": "binary"}
PARAMETERS = [
    Parameter("model.embed_tokens.weight", (100, 256), "io_layers"),
    *(
        p
        for i in (0, 1, 10)
        for p in (
            Parameter(f"model.layers.{i}.input_layernorm.weight", (256,), "norm_params"),
            Parameter(f"model.layers.{i}.self_attn.q_proj.weight", (256, 256), "attention_weights"),
            Parameter(f"model.layers.{i}.self_attn.q_proj.bias", (256,), "kept"),
            Parameter(f"model.layers.{i}.mlp.gate.weight", (4, 256), "kept"),
            Parameter(f"model.layers.{i}.mlp.up_proj.weight", (512, 256), "residual_connections"),
            Parameter(f"model.layers.{i}.mlp.down_proj.weight", (256, 512), "residual_connections"),
        )
    ),
    Parameter("lm_head.weight", (100, 256), "io_layers"),
]


def assign(config, **options) -> dict[str, str | None]:
    formats = Policy.parse(config, **options).assign(PARAMETERS)
    assert list(formats) == [p.name for p in PARAMETERS]
    return {name: fmt.name if fmt else None for name, fmt in formats.items()}


@pytest.mark.parametrize("config", [None, "four-tier", ARTICLE])
def test_policy_article_gives_each_role_its_tier(config):
    got = assign(config)
    assert got["model.embed_tokens.weight"] == got["lm_head.weight"] == "fp16"
    assert got["model.layers.1.self_attn.q_proj.weight"] == "fp8"
    assert got["model.layers.1.mlp.up_proj.weight"] == "int4"
    assert got["model.layers.1.input_layernorm.weight"] == "binary"
    assert got["model.layers.1.self_attn.q_proj.bias"] is None
    assert got["model.layers.1.mlp.gate.weight"] is None


def test_policy_unnamed_roles_are_kept():
    got = assign({"residual_connections": "int4"})
    assert got["model.layers.0.self_attn.q_proj.weight"] is None
    assert got["model.layers.0.input_layernorm.weight"] is None
    assert got["lm_head.weight"] == "fp16"


def test_policy_first_override_wins_over_the_role():
    got = assign(
        {
            **ARTICLE,
            "overrides": [
                [r"layers\.1\..*down_proj", "fp8"],
                ["down_proj", "bf16"],
                [r"lm_head", {"format": "int4", "group_size": 64}],
            ],
        }
    )
    assert got["model.layers.1.mlp.down_proj.weight"] == "fp8"
    assert got["model.layers.10.mlp.down_proj.weight"] == "bf16"
    assert got["lm_head.weight"] == "int4"


def test_policy_override_leaves_protected_parameters_alone():
    got = assign({"overrides": {r"mlp\.": "fp8"}})
    assert got["model.layers.0.mlp.up_proj.weight"] == "fp8"
    assert got["model.layers.0.mlp.gate.weight"] is None


def test_policy_sensitive_matches_whole_segments():
    got = assign(ARTICLE, sensitive=["layers.1", "down_proj"])
    assert got["model.layers.1.mlp.up_proj.weight"] == "fp16"
    assert got["model.layers.1.input_layernorm.weight"] == "fp16"
    assert got["model.layers.10.mlp.up_proj.weight"] == "int4"
    assert got["model.layers.10.mlp.down_proj.weight"] == "fp16"


def test_policy_sensitive_wins_over_overrides_and_joins_the_config():
    config = {
        **ARTICLE,
        "sensitive": ["lm_head"],
        "overrides": {"lm_head": "int4", "up_proj": "fp8"},
    }
    got = assign(config, sensitive=["layers.0"])
    assert got["lm_head.weight"] == "fp16"
    assert got["model.layers.0.mlp.up_proj.weight"] == "fp16"


def test_policy_survives_its_json():
    policy = Policy.parse({**ARTICLE, "overrides": {"lm_head": "int4"}, "sensitive": ["layers.0"]})
    again = Policy.parse(policy.to_json())
    assert again.roles == policy.roles
    assert again.overrides == (("lm_head", Format.parse("int4")),)
    assert again.sensitive == ("layers.0",)


@pytest.mark.parametrize("name", PRESETS)
def test_policy_presets_parse(name: str):
    assert "io_layers" in Policy.parse(name).roles


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_weight": "fp8"}, "did you mean 'attention_weights'"),
        ({"attention_weights": "fp9"}, "attention_weights names the unknown format"),
        ("four_tier", "did you mean 'four-tier'"),
        (3, "expected a mapping"),
        ({"overrides": 3}, "expected a mapping or a list"),
        ({"overrides": [["a", "b", "c"]]}, "pairs"),
        ({"overrides": {"(": "fp8"}}, "no regular expression"),
        ({"overrides": {"lm_hed": "fp8"}}, "did you mean"),
        ({"overrides": {r"mlp\.gate\.": "fp8"}}, "only protected"),
        ({"sensitive": "auto"}, "an argument of Quantizer"),
        ({"sensitive": ["down_prj"]}, "did you mean 'down_proj'"),
        ({"sensitive": ["layers.7"]}, "matches no parameter"),
        ({"sensitive": [3]}, "list of names"),
        ({"default": "int4"}, "default takes no bytes: this model has attention_weights"),
        ({**ARTICLE, "sensitive": ["mlp"]}, "residual_connections takes no bytes: overrides and"),
        ({"norm_params": "fp8"}, "norm_params covers model.layers.0.input_layernorm.weight"),
        ({"attention_weights": "binary"}, "attention_weights covers .*q_proj"),
        ({"overrides": {r"layers\.0\.": "fp8"}}, "override .* covers .*input_layernorm"),
    ],
)
def test_policy_errors_name_the_fix(config, message: str):
    with pytest.raises(ConfigError, match=message):
        Policy.parse(config).assign(PARAMETERS)


def test_policy_takes_int8():
    got = assign({"residual_connections": "int8", "io_layers": {"format": "int8"}})
    assert got["model.layers.0.mlp.up_proj.weight"] == "int8"
    assert got["lm_head.weight"] == "int8"
