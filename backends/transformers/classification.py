"""Text classification with vLLM's schema: `POST /classify` and `/v1/classify`. Loads torch only with the model."""

import argparse
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from backends.serving import Handler, Host, check_model, failed, finished, invalid, json_response, read_json, request_id
from backends.steps import StepReporter
from backends.transformers.sequences import SequenceJob, TokenSequence, Truncation

if TYPE_CHECKING:
    from backends.transformers.encoder import Encoder


class ClassificationRequest(msgspec.Struct):
    """vLLM's request; its other fields are accepted and have no effect here."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    use_activation: bool | None = None
    activation: bool | None = None  # the former name of `use_activation`


REQUEST = msgspec.json.Decoder(ClassificationRequest)


class ClassificationData(msgspec.Struct):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassificationResponse(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[ClassificationData]
    usage: Usage
    object: Literal["list"] = "list"


def load(arguments: argparse.Namespace, reporter: StepReporter) -> "Encoder":
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # only the engine's thread loads torch

    from backends.transformers import encoder  # noqa: PLC0415  # as above

    return encoder.load(arguments.model, AutoModelForSequenceClassification, arguments, reporter)


def posts(host: "Host[Encoder]", arguments: argparse.Namespace) -> Mapping[str, Handler]:
    """The handlers of the task's paths."""

    async def classify(request: Request) -> Response:
        engine = host.engine
        asked = await read_json(request, REQUEST, arguments.max_body_bytes)
        check_model(asked.model, arguments.name)
        shown, attributed = request_id(request)
        sequences = await _sequences(asked, engine, host.queue.capacity)
        jobs = _jobs(asked, sequences, attributed)
        host.queue.put(jobs)
        probs = await finished(request, jobs)
        return json_response(_response(shown, arguments.name, sequences, probs, engine.config.id2label))

    return {"/classify": classify, "/v1/classify": classify}


def _jobs(asked: ClassificationRequest, sequences: list[list[int]], request: str) -> list[SequenceJob]:
    activate = asked.use_activation if asked.use_activation is not None else asked.activation is not False
    return [SequenceJob(request, TokenSequence(ids, activate), size=len(ids)) for ids in sequences]


async def _sequences(asked: ClassificationRequest, engine: "Encoder", most: int) -> list[list[int]]:
    """The request's inputs as token ids. Raises ApiError (400)."""
    inputs = _inputs(asked.input)
    if len(inputs) > most:
        raise invalid(
            f"'input' has {len(inputs)} items; at most {most} are allowed.", "input", "array_above_max_length"
        )
    truncation = _truncation(asked, engine.length)
    texts = [item for item in inputs if isinstance(item, str)]
    if texts:
        sequences = await engine.tokenize(texts, truncation, asked.add_special_tokens)
    else:
        sequences = [_cut(engine, item, truncation) for item in inputs if isinstance(item, list)]
    for ids in sequences:
        _check_length(len(ids), engine.length)
    return sequences


def _inputs(given: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """The items of `input`, which is one text or token sequence, or a list of either. Raises ApiError (400)."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("'input' must not be empty.", "input", "empty_array")
    if all(isinstance(item, int) for item in given):
        return [cast(list[int], given)]
    if all(isinstance(item, str) for item in given):
        return cast(list[str], given)
    if all(isinstance(item, list) for item in given):
        return cast(list[list[int]], given)
    raise invalid("'input' must be a string, an array of strings, an array of token ids, or an array of such.", "input")


def _truncation(asked: ClassificationRequest, longest: int) -> Truncation | None:
    """vLLM's rule: -1 means the model's length, which more must not be asked for. Raises ApiError (400)."""
    length = asked.truncate_prompt_tokens
    if length is None:
        return None
    if length == 0 or length > longest:
        message = f"'truncate_prompt_tokens' must be -1 or from 1 to {longest}, the model's length."
        raise invalid(message, "truncate_prompt_tokens")
    return Truncation(longest if length == -1 else length, asked.truncation_side)


def _cut(engine: "Encoder", ids: list[int], truncation: Truncation | None) -> list[int]:
    try:
        return engine.cut(ids, truncation)
    except ValueError as error:
        raise invalid(f"'input': {error}.", "input") from None


def _check_length(length: int, longest: int) -> None:
    if length == 0:
        raise invalid("'input' must not be empty.", "input")
    if length > longest:
        message = (
            f"This model's maximum context length is {longest} tokens, but an input has {length}. "
            "Shorten it, or ask for truncation with truncate_prompt_tokens=-1."
        )
        raise invalid(message, "input", "context_length_exceeded")


def _response(
    identity: str, model: str, sequences: list[list[int]], probs: list[list[float]], labels: Mapping[int, str]
) -> ClassificationResponse:
    data = []
    for index, row in enumerate(probs):
        if not all(map(math.isfinite, row)):
            raise failed("The model's scores are not finite numbers: dtype float32 may help.", "not_finite")
        best = max(range(len(row)), key=row.__getitem__)
        data.append(ClassificationData(index, labels.get(best), row, len(row)))
    tokens = sum(map(len, sequences))
    return ClassificationResponse(f"classify-{identity}", int(time.time()), model, data, Usage(tokens, tokens))
