"""The model endpoints: which paths are forwarded, what we must read of their requests, and how their streams end.

This is the allow-list: a path that is not here reaches no backend. Of a request only the fields in its head are
decoded; the rest of the body is checked to be JSON and passed on as it came.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from backends.spec import Task
from proxy.relay.dialects import ANTHROPIC, IMAGES, OPENAI, RESPONSES, Dialect


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Head(msgspec.Struct):
    """What every model endpoint's request may say that the proxy needs to know."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatHead(Head, kw_only=True):
    messages: list[msgspec.Raw]


class CompletionHead(Head, kw_only=True):
    prompt: str | list[Any]


class ClassifyHead(Head, kw_only=True):
    """vLLM's: `input` for text, `messages` for a chat that is to be classified."""

    input: str | list[Any] | None = None
    messages: list[msgspec.Raw] | None = None

    def __post_init__(self) -> None:
        if self.input is None and self.messages is None:
            raise ValueError("Object missing required field `input`")


class ImageHead(Head, kw_only=True):
    prompt: str
    n: int | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`task` labels receipts and metrics; `served_by` are the tasks of backends that can answer here."""

    path: str
    task: str
    served_by: frozenset[Task]
    dialect: Dialect
    decode: Callable[[bytes], Head]


def _endpoint(path: str, task: str, served_by: set[Task], head: type[Head], dialect: Dialect = OPENAI) -> Endpoint:
    return Endpoint(path, task, frozenset(served_by), dialect, msgspec.json.Decoder(head).decode)


_POOLING: set[Task] = {"embedding", "classification", "score"}

_TABLE = [
    _endpoint("/v1/chat/completions", "chat", {"chat"}, ChatHead),
    _endpoint("/v1/completions", "completion", {"chat"}, CompletionHead),
    _endpoint("/v1/responses", "chat", {"chat"}, Head, RESPONSES),
    _endpoint("/v1/messages", "chat", {"chat"}, ChatHead, ANTHROPIC),
    _endpoint("/v1/messages/count_tokens", "tokenization", {"chat"}, ChatHead, ANTHROPIC),
    _endpoint("/v1/embeddings", "embedding", {"embedding"}, Head),
    _endpoint("/classify", "classification", {"classification"}, ClassifyHead),
    _endpoint("/v1/classify", "classification", {"classification"}, ClassifyHead),
    _endpoint("/pooling", "embedding", _POOLING, Head),
    _endpoint("/score", "score", {"score"}, Head),
    _endpoint("/rerank", "score", {"score"}, Head),
    _endpoint("/v1/rerank", "score", {"score"}, Head),
    _endpoint("/tokenize", "tokenization", {"chat", *_POOLING}, Head),
    _endpoint("/detokenize", "tokenization", {"chat", *_POOLING}, Head),
    _endpoint("/v1/images/generations", "image", {"image"}, ImageHead, IMAGES),
]

#: By path, exactly as it is requested.
ENDPOINTS: dict[str, Endpoint] = {endpoint.path: endpoint for endpoint in _TABLE}
