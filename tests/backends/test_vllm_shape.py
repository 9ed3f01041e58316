"""A model's shape is read from its files, without loading it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from backends.vllm.shape import ModelShape, find_model, read_shape

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def model(folder: Path, config: dict[str, Any], *files: dict[str, tuple[str, list[int]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(files):
        head = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **head}).encode()
        (folder / f"model-{number}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def test_a_dense_model(tmp_path: Path) -> None:
    folder = model(tmp_path, CONFIG, {"a": ("BF16", [64, 100])}, {"b": ("F32", [100])})
    bytes_each = (6400 * 2 + 100 * 4) / 6500
    assert read_shape(folder) == ModelShape(6500, 6500, 2, 32, 64, bytes_each)


def test_a_token_passes_some_of_a_mixtures_experts(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    shape = read_shape(model(tmp_path, {**CONFIG, **experts}, {"a": ("BF16", [100_000])}))
    assert shape
    assert shape.active_parameters == 100_000 - 3 * 64 * 10 * 2 * 6


def test_the_language_part_of_a_model_that_sees(tmp_path: Path) -> None:
    shape = read_shape(model(tmp_path, {"text_config": {**CONFIG, "head_dim": 8}}, {"a": ("F16", [10])}))
    assert shape
    assert (shape.layers, shape.kv_width, shape.attention_width) == (2, 16, 32)


@pytest.mark.parametrize("config", [{}, [], {"num_hidden_layers": "x"}, {"num_hidden_layers": 2}])
def test_files_that_do_not_tell(tmp_path: Path, config: Any) -> None:
    assert read_shape(model(tmp_path, config, {"a": ("BF16", [4])})) is None


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    folder = model(tmp_path, CONFIG)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert read_shape(folder) is None


def test_a_model_is_found_by_its_folder_or_in_the_hubs_cache(tmp_path: Path) -> None:
    local = model(tmp_path / "local", CONFIG)
    assert find_model(str(local)) == local
    cached = model(tmp_path / "hub" / "models--org--name" / "snapshots" / "abc", CONFIG)
    assert find_model("org/name", {"HF_HUB_CACHE": str(tmp_path / "hub")}) == cached
    assert find_model("org/name", {"HF_HOME": str(tmp_path)}) == cached
    assert find_model("org/other", {"HF_HOME": str(tmp_path)}) is None
