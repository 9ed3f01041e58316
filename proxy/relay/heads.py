"""What must be read of a request, by the form of its body: only these fields are decoded, the rest is passed on."""

from typing import Any

import msgspec


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


class SpeechHead(Head, kw_only=True):
    input: str


class InputPart(msgspec.Struct):
    """One part of a moderation's input: text, or a picture (which a text classifier cannot see)."""

    type: str
    text: str | None = None


class ModerationHead(Head, kw_only=True):
    """OpenAI's: a text, several texts, or the parts of one input."""

    input: str | list[str | InputPart]


class HubParameters(msgspec.Struct):
    """What `huggingface_hub.InferenceClient` may ask of a pipeline."""

    top_k: int | None = None
    function_to_apply: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None


class HubTextHead(Head, kw_only=True):
    inputs: str | list[str]
    parameters: HubParameters | None = None


class HubPromptHead(Head, kw_only=True):
    inputs: str
    parameters: HubParameters | None = None


class PredictHead(Head, kw_only=True):
    """Text Embeddings Inference's: one text, or a batch of lists of one text each; a pair has no meaning here."""

    inputs: str | list[str | list[str]]
    raw_scores: bool = False
    truncate: bool | None = None
