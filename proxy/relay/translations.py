"""Endpoints that no backend speaks, told in the terms of one that it does: the request there, the answer back.

A classifier's answer (vLLM's `/classify`) names its likeliest label only and gives the others' scores without names. So
the answers here tell that one label, and no name is made up for the rest.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import msgspec

from proxy.errors import InvalidRequest
from proxy.relay.heads import Head, HubPromptHead, HubTextHead, InputPart, ModerationHead, PredictHead

#: Labels that say that nothing is wrong, in lower case; a model's own go into its configuration.
BENIGN = frozenset(
    {"safe", "ok", "okay", "clean", "neutral", "none", "normal", "benign", "ham", "positive", "acceptable", "sfw"}
    | {"non-toxic", "non_toxic", "nontoxic", "not_toxic", "non-hate", "not_hate", "nothate", "no_hate", "label_0"}
)
#: OpenAI's categories, which its clients expect to find. A classifier that has no such label has not judged by them:
#: as OpenAI does where a model cannot, they are false, with a score of 0 that applies to no input at all.
CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
JSON = b"application/json"


class Translation(Protocol):
    """`path` is the backend's endpoint."""

    @property
    def path(self) -> str: ...
    def request(self, head: Head, model: str) -> bytes:
        """The backend's request; raises InvalidRequest."""
        ...

    def answer(self, head: Head, body: bytes, model: str, id_: str) -> tuple[bytes, bytes]:
        """The client's answer and its content type; raises ValueError for what the backend should not have said."""
        ...


class ClassRow(msgspec.Struct):
    """One input's row in the answer of `/classify`."""

    probs: list[float]
    label: str | None = None

    @property
    def best(self) -> tuple[str, float]:
        """The likeliest label and its score."""
        if not self.probs:
            raise ValueError("the classifier told no scores")
        at = max(range(len(self.probs)), key=self.probs.__getitem__)
        return self.label or f"LABEL_{at}", self.probs[at]


class _Classes(msgspec.Struct):
    data: list[ClassRow]


class _Picture(msgspec.Struct):
    b64_json: str


class _Pictures(msgspec.Struct):
    data: list[_Picture]


H = TypeVar("H", bound=Head)


@dataclass(frozen=True, slots=True)
class Classification:
    """Texts for a classifier. `texts` are a head's inputs, `shape` makes the client's answer of their best labels."""

    texts: Callable[[Any], Sequence[str]]
    shape: Callable[[Any, list[tuple[str, float]]], Any]
    options: Callable[[Any], dict[str, Any]] = lambda _: {}
    path: str = "/classify"

    def request(self, head: Head, model: str) -> bytes:
        texts = list(self.texts(head))
        if not texts:
            raise InvalidRequest("There is nothing to classify: the input is empty.", param="input")
        return msgspec.json.encode({"model": model, "input": texts, **self.options(head)})

    def answer(self, head: Head, body: bytes, model: str, id_: str) -> tuple[bytes, bytes]:
        best = [row.best for row in msgspec.json.decode(body, type=_Classes).data]
        if len(best) != len(self.texts(head)):
            raise ValueError("the classifier answered another number of inputs")
        return msgspec.json.encode(self.shape(head, best)), JSON


@dataclass(frozen=True, slots=True)
class Moderation:
    """OpenAI's moderations by a classifier: flagged where its likeliest label is not benign and likely enough.

    `benign` (labels, in lower case) and `threshold` by the model's name; other models have the defaults.
    """

    benign: dict[str, frozenset[str]]
    thresholds: dict[str, float]
    path: str = "/classify"

    def request(self, head: Head, model: str) -> bytes:
        return msgspec.json.encode({"model": model, "input": _moderated(cast(ModerationHead, head))})

    def answer(self, head: Head, body: bytes, model: str, id_: str) -> tuple[bytes, bytes]:
        rows = msgspec.json.decode(body, type=_Classes).data
        results = [self._result(model, *row.best) for row in rows]
        return msgspec.json.encode({"id": f"modr-{id_}", "model": model, "results": results}), JSON

    def _result(self, model: str, label: str, score: float) -> dict[str, Any]:
        harmless = label.lower() in self.benign.get(model, BENIGN)
        flagged = not harmless and score >= self.thresholds.get(model, 0.5)
        return {
            "flagged": flagged,
            "categories": dict.fromkeys(CATEGORIES, False) | {label: flagged},
            "category_scores": dict.fromkeys(CATEGORIES, 0.0) | {label: score},
            "category_applied_input_types": dict.fromkeys(CATEGORIES, ()) | {label: ["text"]},
        }


@dataclass(frozen=True, slots=True)
class Painting:
    """`text-to-image` of `InferenceClient`: it wants the picture's bytes, not JSON."""

    path: str = "/v1/images/generations"

    def request(self, head: Head, model: str) -> bytes:
        asked = cast(HubPromptHead, head)
        given = msgspec.to_builtins(asked.parameters) if asked.parameters else {}
        width, height = given.pop("width", None), given.pop("height", None)
        wanted = {name: given[name] for name in _PAINTER_FIELDS if given.get(name) is not None}
        if width or height:
            wanted["size"] = f"{width or height}x{height or width}"
        return msgspec.json.encode({"model": model, "prompt": asked.inputs, "response_format": "b64_json", **wanted})

    def answer(self, head: Head, body: bytes, model: str, id_: str) -> tuple[bytes, bytes]:
        pictures = msgspec.json.decode(body, type=_Pictures).data
        if not pictures:
            raise ValueError("the backend made no picture")
        try:
            picture = base64.b64decode(pictures[0].b64_json, validate=True)
        except binascii.Error as error:
            raise ValueError("the backend's picture is not base64") from error
        return picture, _image_type(picture)


_PAINTER_FIELDS = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed")


def _image_type(picture: bytes) -> bytes:
    if picture.startswith(b"\xff\xd8"):
        return b"image/jpeg"
    return b"image/webp" if picture[8:12] == b"WEBP" else b"image/png"


def _moderated(head: ModerationHead) -> list[str]:
    """The texts to classify: a list of parts is one input."""
    if isinstance(head.input, str):
        return [head.input]
    parts = [part for part in head.input if isinstance(part, InputPart)]
    texts = [part for part in head.input if isinstance(part, str)]
    if not parts:
        if not texts:
            raise InvalidRequest("There is nothing to classify: the input is empty.", param="input")
        return texts
    if texts or any(part.type != "text" or part.text is None for part in parts):
        raise InvalidRequest("This classifier moderates text only.", param="input", code="unsupported_input")
    return ["\n".join(part.text or "" for part in parts)]


def _hub_texts(head: HubTextHead) -> list[str]:
    return [head.inputs] if isinstance(head.inputs, str) else head.inputs


def _hub_options(head: HubTextHead) -> dict[str, Any]:
    """`function_to_apply: none` asks for the scores before softmax or sigmoid."""
    raw = head.parameters is not None and head.parameters.function_to_apply == "none"
    return {"use_activation": False} if raw else {}


def _label(best: tuple[str, float]) -> dict[str, Any]:
    return {"label": best[0], "score": best[1]}


def _predicted(head: PredictHead) -> list[str]:
    if isinstance(head.inputs, str):
        return [head.inputs]
    rows = [[row] if isinstance(row, str) else row for row in _batch(head.inputs)]
    if any(len(row) != 1 for row in rows):
        message = "Pairs cannot be classified here; a batch is a list of lists of one text each: [[text], [text]]."
        raise InvalidRequest(message, param="inputs", code="unsupported_input")
    return [row[0] for row in rows]


def _batch(inputs: list[str | list[str]]) -> Sequence[str | list[str]]:
    """A list of texts alone is one input (a text, or a pair)."""
    texts = [text for text in inputs if isinstance(text, str)]
    return [texts] if texts and len(texts) == len(inputs) else inputs


def _predictions(head: PredictHead, best: list[tuple[str, float]]) -> Any:
    single = isinstance(head.inputs, str) or all(isinstance(row, str) for row in head.inputs)
    return [_label(best[0])] if single else [[_label(one)] for one in best]


HUB_CLASSIFICATION = Classification(_hub_texts, lambda _, best: [[_label(one)] for one in best], _hub_options)
PREDICTION = Classification(_predicted, _predictions, lambda head: {"use_activation": False} if head.raw_scores else {})
HUB_PAINTING = Painting()
