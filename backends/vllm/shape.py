"""A model's shape, from its `config.json` and the heads of its weight files: what a prior of its costs is made of."""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_MAX_HEAD_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The arguments of `prior_from_model` that the model itself knows.

    `kv_width` is key/value heads x head size, `attention_width` query heads x head size; `active_parameters` are those
    a token passes (fewer than all in a mixture of experts); `parameter_bytes` is the mean over the weights as stored.
    """

    parameters: float
    active_parameters: float
    layers: int
    kv_width: int
    attention_width: int
    parameter_bytes: float


def find_model(model: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of a model that is on this machine: its own, or in the hub's cache; None for one that is not."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    found = sorted(cache.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def read_shape(folder: Path) -> ModelShape | None:
    """The shape of a transformer; None where the files do not tell it."""
    try:
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config", config)  # of a model that sees, the part that writes
        weights = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in _tensors(file)]
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        size = int(text.get("head_dim") or text["hidden_size"] // heads)
        parameters = sum(count for count, _ in weights)
        if not parameters:
            return None
        return ModelShape(
            parameters=parameters,
            active_parameters=parameters - _idle_experts(text, layers),
            layers=layers,
            kv_width=int(text.get("num_key_value_heads") or heads) * size,
            attention_width=heads * size,
            parameter_bytes=sum(count * width for count, width in weights) / parameters,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tensors(file: Path) -> Iterator[tuple[int, int]]:
    """Numbers and bytes each of every tensor in a safetensors file, from its head alone."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _MAX_HEAD_BYTES:
            raise ValueError(f"{file}: not a safetensors file")
        head = json.loads(opened.read(length))
    for name, tensor in head.items():
        if name != "__metadata__":
            yield math.prod(tensor["shape"]), _BYTES[tensor["dtype"]]


def _idle_experts(config: Mapping[str, Any], layers: int) -> float:
    """Parameters of the experts that a token does not pass."""
    experts = int(config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0)
    if not experts:
        return 0.0
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    dense = int(config.get("first_k_dense_replace") or 0)
    return 3.0 * int(config["hidden_size"]) * width * (layers - dense) * (experts - int(config["num_experts_per_tok"]))
