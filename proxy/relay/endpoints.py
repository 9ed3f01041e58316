"""The model endpoints: which paths are forwarded, what we must read of their requests, and how their streams end.

This is the allow-list: a path that is not here reaches no backend. Of a request only the fields in its head are
decoded; the rest of the body is checked to be JSON and passed on as it came.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from backends.spec import Task
from proxy.relay.dialects import ANTHROPIC, AUDIO, IMAGES, OPENAI, RESPONSES, Dialect
from proxy.relay.heads import (
    ChatHead,
    ClassifyHead,
    CompletionHead,
    Head,
    HubPromptHead,
    HubTextHead,
    ImageHead,
    ModerationHead,
    PredictHead,
    SpeechHead,
)
from proxy.relay.translations import HUB_CLASSIFICATION, HUB_PAINTING, PREDICTION, Moderation, Translation

Body = Literal["json", "form", "either"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`task` labels receipts and metrics; `served_by` are the tasks of backends that can answer here.

    `body` is what a request brings: JSON, a multipart form, or either. `translation` is for what no backend speaks.
    """

    path: str
    task: str
    served_by: frozenset[Task]
    dialect: Dialect
    decode: Callable[[bytes], Head]
    body: Body = "json"
    translation: Translation | None = None

    @property
    def upstream_path(self) -> str:
        return self.path if self.translation is None else self.translation.path


def _endpoint(
    path: str,
    task: str,
    served_by: set[Task],
    head: type[Head],
    dialect: Dialect = OPENAI,
    *,
    body: Body = "json",
    translation: Translation | None = None,
) -> Endpoint:
    return Endpoint(path, task, frozenset(served_by), dialect, msgspec.json.Decoder(head).decode, body, translation)


MODERATIONS = "/v1/moderations"
_CLASSIFYING: set[Task] = {"classification"}
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
    _endpoint("/v1/images/edits", "image", {"image"}, ImageHead, IMAGES, body="either"),
    _endpoint("/v1/audio/transcriptions", "audio", {"audio"}, Head, AUDIO, body="form"),
    _endpoint("/v1/audio/translations", "audio", {"audio"}, Head, AUDIO, body="form"),
    _endpoint("/v1/audio/speech", "audio", {"audio"}, SpeechHead, AUDIO),
    _endpoint(MODERATIONS, "moderation", _CLASSIFYING, ModerationHead, translation=Moderation({}, {})),
    _endpoint("/predict", "classification", _CLASSIFYING, PredictHead, translation=PREDICTION),
]

#: By path, exactly as it is requested.
ENDPOINTS: dict[str, Endpoint] = {endpoint.path: endpoint for endpoint in _TABLE}

#: `/models/{model}/pipeline/{task}` by task. Without the task it is the first of these that the model's backend serves.
PIPELINES: dict[str, Endpoint] = {
    "text-classification": _endpoint(
        "/models/{model}/pipeline/text-classification",
        "classification",
        _CLASSIFYING,
        HubTextHead,
        translation=HUB_CLASSIFICATION,
    ),
    "text-to-image": _endpoint(
        "/models/{model}/pipeline/text-to-image", "image", {"image"}, HubPromptHead, translation=HUB_PAINTING
    ),
}


def moderations(terms: Moderation) -> Endpoint:
    """The moderations as configured."""
    return replace(ENDPOINTS[MODERATIONS], translation=terms)
