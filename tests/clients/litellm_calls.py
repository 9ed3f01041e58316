"""The usual calls of LiteLLM as a client, against the proxy at URL; prints what came of each as one JSON object.

    python litellm_calls.py URL

Run by LiteLLM's own environment, not by ours. Each call tells its answer and the energy headers of every answer that
came over the wire (LiteLLM keeps only what it knows of a body, and hands on headers).
"""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
url = sys.argv[1]

import litellm  # type: ignore[import-not-found] # noqa: E402 - in its own environment; it reads the variable above

litellm.telemetry = False
litellm.suppress_debug_info = True

OPENAI = {"api_base": f"{url}/v1", "api_key": "unused"}
MESSAGES = [{"role": "user", "content": "hi [[tokens=6]]"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SHAPE = {"type": "object", "properties": {"reason": {"type": "string"}}, "required": ["reason"]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answered", "schema": SHAPE, "strict": True}}


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def named(name: str) -> dict[str, Any]:
    """What makes the proxy remember the request by a name of ours."""
    return {"extra_headers": {"X-Request-Id": name}}


def headers(answer: Any) -> dict[str, str]:
    """The energy headers that LiteLLM hands on of an answer, under names of its own."""
    more = getattr(answer, "_response_headers", None) or {}
    handed = {**(answer._hidden_params.get("additional_headers") or {}), **more}
    plain = {name.lower().removeprefix("llm_provider-"): str(value) for name, value in handed.items()}
    return {name: value for name, value in plain.items() if name.startswith(("x-energy", "x-request"))}


def chat(answer: Any) -> dict[str, Any]:
    return {"answer": answer.choices[0].message.content, "headers": headers(answer)}


def text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def stream(answer: Any) -> dict[str, Any]:
    chunks = list(answer)
    usage = getattr(chunks[-1], "usage", None)
    return {"answer": [text(chunks), usage and usage.completion_tokens], "headers": headers(answer)}


def tools(answer: Any) -> dict[str, Any]:
    (call,) = answer.choices[0].message.tool_calls
    told = [answer.choices[0].finish_reason, call.function.name, call.function.arguments]
    return {"answer": told, "headers": headers(answer)}


def embedding(answer: Any) -> dict[str, Any]:
    rows = [[round(x, 2) for x in row["embedding"]] for row in answer.data]
    return {"answer": rows, "headers": headers(answer)}


def transcription() -> dict[str, Any]:
    """LiteLLM sends no headers of ours here."""
    answer = litellm.transcription("openai/chat", file=("a.wav", b"RIFF"), **OPENAI)
    return {"answer": answer.text, "headers": headers(answer)}


async def together(name: str) -> dict[str, Any]:
    """Asynchronous calls, several at once, then a stream."""
    more = {**OPENAI, **named(name)}
    answers = await asyncio.gather(*(litellm.acompletion("openai/chat", MESSAGES, **more) for _ in range(5)))
    streamed = await litellm.acompletion("openai/chat", MESSAGES, stream=True, **more)
    told = text([chunk async for chunk in streamed])
    return {"answer": [*(answer.choices[0].message.content for answer in answers), told]}


def failure(doing: Callable[[], Any]) -> dict[str, Any]:
    try:
        doing()
    except Exception as error:
        return {"answer": [type(error).__name__, getattr(error, "status_code", None)], "message": str(error)}
    return {"answer": "it did not fail"}


def ask(messages: Any, name: str, model: str = "openai/chat", **more: Any) -> Any:
    return litellm.completion(model, messages, **{**OPENAI, **named(name), **more})


def ask_as_anthropic(name: str, **more: Any) -> Any:
    return ask(MESSAGES, name, "anthropic/chat", max_tokens=6, api_base=url, **more)


CALLS: dict[str, Callable[[str], Any]] = {
    "chat": lambda name: chat(ask(MESSAGES, name)),
    "stream": lambda name: stream(ask(MESSAGES, name, stream=True)),
    "stream_with_usage": lambda name: stream(ask(MESSAGES, name, stream=True, stream_options={"include_usage": True})),
    "tools": lambda name: tools(ask(MESSAGES, name, tools=[WEATHER])),
    "structured": lambda name: chat(ask(MESSAGES, name, response_format=SCHEMA)),
    "completion": lambda name: {
        "answer": litellm.text_completion(
            model="text-completion-openai/chat", prompt="hi [[tokens=3]]", **OPENAI, **named(name)
        )
        .choices[0]
        .text
    },
    "responses": lambda name: {
        "answer": litellm.responses(input="hi [[tokens=3]]", model="openai/chat", **OPENAI, **named(name))
        .output[0]
        .content[0]
        .text
    },
    "embeddings": lambda name: embedding(
        litellm.embedding("openai/chat", input=["one", "two"], **OPENAI, **named(name))
    ),
    "images": lambda name: {
        "answer": [
            row.b64_json[:5]
            for row in litellm.image_generation("an apple", model="openai/painter", n=2, **OPENAI, **named(name)).data
        ]
    },
    "transcription": lambda _: transcription(),
    "asynchronous": lambda name: asyncio.run(together(name)),
    "anthropic": lambda name: chat(ask_as_anthropic(name)),
    "anthropic_tools": lambda name: tools(ask_as_anthropic(name, tools=[WEATHER])),
    "anthropic_stream": lambda name: {"answer": text(ask_as_anthropic(name, stream=True))},
    "no_such_model": lambda name: failure(lambda: ask(MESSAGES, name, "openai/nope")),
    "bad_request": lambda name: failure(lambda: ask(MESSAGES, name, extra_body={"stream": "yes"})),
    "refused_by_the_backend": lambda name: failure(lambda: ask(said("[[status=400]]"), name)),
    "rate_limit": lambda name: failure(lambda: ask(said("[[status=429]]"), name, max_retries=0)),
    "broken_stream": lambda name: failure(lambda: list(ask(said("[[tokens=9 cut_after=3]]"), name, stream=True))),
    "retries": lambda name: failure(lambda: ask(said("once more [[status=500]]"), name, max_retries=2)),
}


def called(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = CALLS[name](f"litellm-{name}")
    except Exception:
        return {"answer": traceback.format_exc()}
    return found


if __name__ == "__main__":
    json.dump({name: called(name) for name in CALLS}, sys.stdout)
