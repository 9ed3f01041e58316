"""A configuration is taken whole or refused in one line that names the field and what it should be."""

from pathlib import Path
from typing import Any

import pytest

from proxy.config import Config, load, parse
from proxy.errors import ConfigError

DESIGN_EXAMPLE = """
server: {host: 127.0.0.1, port: 8000}
auth: {required: false}
store: {url: "sqlite:///joulegate.db"}
energy:
  sample_hz: 20
  boundary: node
  pue: 1.12
  carbon: {source: codecarbon, country: FRA}
models:
  - {name: chat, backend: {kind: vllm, model: Qwen/Qwen3-8B, devices: [0], args: {max-model-len: 8192}}}
  - {name: sentiment, backend: {kind: transformers, model: distilbert/sst-2, devices: [1]}}
  - {name: painter, backend: {kind: diffusers, model: stabilityai/stable-diffusion-xl-base-1.0, devices: [1]}}
  - {name: elsewhere, backend: {kind: remote, url: "http://10.0.0.5:8000"}}
"""

ENGINE = {"kind": "vllm", "model": "m"}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "joulegate.yaml"
    path.write_text(text)
    return path


def test_the_example_of_the_documentation_is_taken(tmp_path: Path) -> None:
    config = load(written(tmp_path, DESIGN_EXAMPLE))
    assert [model.specs()[0].device_names for model in config.models] == [("gpu:0",), ("gpu:1",), ("gpu:1",), ("host",)]
    assert config.models[0].specs()[0].args == {"max-model-len": 8192}


def test_without_a_file_the_starter_models_are_served() -> None:
    assert [model.name for model in Config().models] == ["smollm2", "sentiment", "painter"]


@pytest.mark.parametrize(
    ("document", "path", "reason"),
    [
        ({"server": {"prot": 1}}, "server.prot", "no such field"),
        ({"server": {"port": 70000}}, "server.port", "65535"),
        ({"energy": {"boundary": "moon"}}, "energy.boundary", "'gpu', 'node' or 'facility'"),
        ({"energy": {"boundary": "facility"}}, "energy", "needs pue"),
        ({"energy": {"carbon": {"source": "static"}}}, "energy.carbon", "needs grams_per_kwh"),
        ({"models": [{"name": "a", "backend": {"kind": "vllm"}}]}, "models[0].backend", "needs model"),
        ({"models": [{"name": "a", "backend": {"kind": "remote"}}]}, "models[0].backend", "needs url"),
        ({"models": [{"name": "a b", "backend": {"kind": "vllm", "model": "m"}}]}, "models[0]", "letters, digits"),
        ({"models": [{"name": "proxy", "backend": {"kind": "vllm", "model": "m"}}]}, "models[0]", "not be 'proxy'"),
        ({"models": [{"name": "a", "backend": {"kind": "remote", "url": "http://"}}]}, "models[0].backend", "a host"),
        ({"models": [{"name": "a", "backend": {"kind": "remote", "url": "http://[b"}}]}, "models[0].backend", "a host"),
        (
            {"models": [{"name": "a", "backend": {"kind": "remote", "url": "http://a:x"}}]},
            "models[0].backend",
            "a host",
        ),
        ({"server": {"host": ""}}, "server.host", "at least 1"),
        ({"server": {"timeouts": {"total": 0}}}, "server.timeouts.total", "greater than 0"),
        ({"models": [{"name": "a"}]}, "models[0]", "either backend or replicas"),
        (
            {"models": [{"name": "a", "backend": ENGINE, "replicas": [ENGINE]}]},
            "models[0]",
            "either backend or replicas",
        ),
        ({"models": [{"name": "a", "replicas": []}]}, "models[0].replicas", "at least 1"),
        ({"models": [{"name": "a", "backend": ENGINE, "max_queue": 3}]}, "models[0]", "needs max_in_flight"),
        ({"models": [{"name": "a", "backend": ENGINE, "aliases": ["b c"]}]}, "models[0]", "letters, digits"),
        ({"auth": {"required": True}}, "auth", "no keys"),
    ],
)
def test_a_bad_field_is_named(document: dict[str, Any], path: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(document, source="c.yaml")
    assert str(caught.value).startswith(f"c.yaml: {path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["server: [", "- 1", "\tserver: 1", "server: {port: [1,2}", "[" * 5000, "a: 2020-13-45", "? [a]\n: 1"]
)
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'port' stands twice.* line 3"):
        load(written(tmp_path, "server:\n  port: 1\n  port: 2\n"))


def test_yaml_merges_still_work(tmp_path: Path) -> None:
    text = "models:\n- {name: a, backend: &one {kind: vllm, model: m}}\n- {name: b, backend: {<<: *one, model: n}}\n"
    assert [model.specs()[0].model for model in load(written(tmp_path, text)).models] == ["m", "n"]


@pytest.mark.parametrize(
    "other", [{"name": "a-2", "backend": ENGINE}, {"name": "c", "backend": ENGINE, "aliases": ["a"]}]
)
def test_replicas_and_aliases_have_names_of_their_own(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'a(-2)?' stands twice"):
        parse({"models": [{"name": "a", "replicas": [ENGINE, ENGINE]}, other]}, source="c.yaml")


def test_two_models_of_one_name_are_refused() -> None:
    one = {"name": "a", "backend": {"kind": "vllm", "model": "m"}}
    with pytest.raises(ConfigError, match="'a' stands twice"):
        parse({"models": [one, one]}, source="c.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file"):
        load(tmp_path / "nowhere.yaml")
