"""What a llamacpp backend can be told, named as llama.cpp names its flags; loads no engine."""

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A flag: what it means (as an error says it), how its value is read, and what it is unless given."""

    name: str
    meaning: str
    parse: Callable[[str], object]
    default: object


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if (number := int(text)) < least:
            raise ValueError(text)
        return number

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        # YAML reads a bare on and off as true and false.
        word = {"true": "on", "false": "off"}.get(text.lower(), text.lower())
        if word not in choices:
            raise ValueError(text)
        return word

    return parse


def default_threads() -> int:
    """Half of the processors we may use. llama.cpp's threads spin while they wait for each other: where they outnumber
    the idle cores (and the proxy and other backends need some too), generation was seen to slow down tenfold.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

OPTIONS = {
    option.name: option
    for option in (
        Option("ctx-size", "tokens of context for each request, at least 64", _at_least(64), 4096),
        Option("parallel", "requests generated at once, at least 1", _at_least(1), 4),
        Option("threads", "threads that compute, at least 1", _at_least(1), default_threads()),
        Option("gpu-layers", "layers on the GPU, at least 0", _at_least(0), None),
        Option("batch-size", "tokens of a prompt taken in at once, at least 32", _at_least(32), 2048),
        Option("ubatch-size", "tokens computed at once, at least 1", _at_least(1), 512),
        Option("flash-attn", "on, off or auto", _one_of("on", "off", "auto"), "auto"),
        Option("cache-type-k", f"one of {', '.join(_CACHE_TYPES)}", _one_of(*_CACHE_TYPES), "f16"),
        Option("cache-type-v", f"one of {', '.join(_CACHE_TYPES)}", _one_of(*_CACHE_TYPES), "f16"),
        Option("chat-template", "a Jinja template, in place of the model's own", str, ""),
        Option("mmproj", "the path of a multimodal projector's GGUF file", str, ""),
        Option("embeddings", "on (the model embeds, and does not chat) or off", _one_of("on", "off"), "off"),
    )
}
