"""The server's settings: the article's file as written, and one clear error for each mistake."""

import pytest

from fastgpt.config import ServerConfig
from fastgpt.errors import ConfigError


def test_config_the_articles_file(tmp_path):
    path = tmp_path / "fastgpt_config.yaml"
    path.write_text(
        "service:\n  port: 8080\n  batch_size: 32\n  max_length: 2048\n"
        "hardware:\n  gpu_id: 0\n  memory_pool_size: 24GB # 90 %\n"
        "optimization:\n  async_pipeline: true\n  precision: mixed\n"
    )
    config = ServerConfig.from_yaml(path, {"service.port": 9000, "service.host": None})
    assert config.service.port == 9000
    assert config.service.batch_size == 32
    assert config.hardware.memory_pool_size == "24GB"
    assert config.service.host == "127.0.0.1"


@pytest.mark.parametrize(("text", "seconds"), [("100ms", 0.1), ("2s", 2.0), (50, 0.05)])
def test_config_durations(text, seconds):
    config = ServerConfig.from_mapping({"service": {"batch_timeout": text}})
    assert config.service.batch_timeout_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"servce": {}}, "unknown key 'servce'; did you mean 'service'"),
        ({"service": {"prot": 1}}, "unknown key service.prot; did you mean 'service.port'"),
        ({"port": 3}, "belongs to service.port"),
        ({"service": {"gpu_id": 3}}, "belongs to hardware.gpu_id"),
        ({"service": {"max_batch": 3}}, "called service.batch_size"),
        ({"service": {"zzz": 3}}, "known keys: host, port"),
        ({"service": {"port": "x"}}, "service.port is 'x'; expected an integer"),
        ({"service": {"port": 70000}}, "expected 0 to 65535"),
        ({"service": {"batch_size": True}}, "service.batch_size is True; expected an integer"),
        ({"service": {"host": ""}}, "service.host is empty; use 127.0.0.1"),
        ({"hardware": {"memory_pool_size": True}}, "size is True; expected bytes"),
        ({"service": {"min_batch": 64}}, "expected 1 to 32"),
        ({"service": {"batch_timeout": "soon"}}, "service.batch_timeout: duration is 'soon'"),
        ({"service": 5}, "service is 5; expected keys"),
        ({"hardware": {"memory_pool_size": "24 apples"}}, "hardware.memory_pool_size: size is"),
        ({"hardware": {"memory_pool_size": 24}}, "did you mean 24GB"),
        ({"hardware": {"swap_to_cpu": "yes"}}, "hardware.swap_to_cpu is 'yes'; expected true or"),
        ({"optimization": {"async_pipeline": False}}, "async_pipeline is false, not available"),
        ({"optimization": {"precision": "fp8"}}, "precision is 'fp8', not available"),
    ],
)
def test_config_mistakes_are_named(tree, message):
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_mapping(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "not valid YAML"), (b"- 1", "holds list"), (b"\xff\xfe\xff", "not")],
)
def test_config_files_that_are_no_settings(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ServerConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_config_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        ServerConfig.from_yaml(tmp_path / "none.yaml")


def test_config_swap_to_cpu_is_accepted():
    assert not ServerConfig().hardware.swap_to_cpu
    assert ServerConfig.from_mapping({"hardware": {"swap_to_cpu": True}}).hardware.swap_to_cpu
