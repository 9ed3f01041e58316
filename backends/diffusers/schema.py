"""OpenAI's schema of image generation, with the extras other servers of diffusion models take. Loads no torch."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from backends.diffusers.drawing import Drawing
from backends.serving import invalid

_MOST_PROMPT = 32_000
_LARGEST_SEED = 2**63 - 1

Text = Annotated[str, msgspec.Meta(max_length=_MOST_PROMPT)]
OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]

#: Denoising steps for each step of the default, and the quality that the answer names.
_QUALITIES: Mapping[Quality, tuple[float, str]] = {
    "auto": (1.0, "medium"),
    "low": (0.5, "low"),
    "medium": (1.0, "medium"),
    "standard": (1.0, "medium"),
    "high": (1.5, "high"),
    "hd": (1.5, "high"),
}


class ImageRequest(msgspec.Struct):
    """OpenAI's request; its other fields (`user`, `style`, `moderation`, …) are accepted and have no effect here."""

    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=_MOST_PROMPT)]
    model: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = None
    size: str | None = None
    quality: Quality | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=3)] | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_SEED)] | None = None


REQUEST = msgspec.json.Decoder(ImageRequest)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a loaded pipeline can draw: pixels, and the arguments it takes."""

    width: int
    height: int
    multiple: int
    most_pixels: int
    most_steps: int
    steps: int | None
    guidance_scale: float | None
    arguments: Collection[str]


@dataclass(frozen=True, slots=True)
class Look:
    """How images are sent, and what the answer says about them."""

    size: str
    quality: str
    output_format: OutputFormat
    compression: int
    background: str = "opaque"

    def fields(self) -> dict[str, Any]:
        return {
            "background": self.background,
            "output_format": self.output_format,
            "quality": self.quality,
            "size": self.size,
        }


def usage(text_tokens: int, latent_pixels: int) -> dict[str, Any]:
    """OpenAI's `usage`: tokens in are the prompt's, tokens out the latent pixels of the images."""
    return {
        "input_tokens": text_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens": latent_pixels,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": latent_pixels},
        "total_tokens": text_tokens + latent_pixels,
    }


def understood(asked: ImageRequest, can: Abilities) -> tuple[Drawing, Look]:
    """What is to be drawn and how it is to be sent. Raises ApiError (400) naming the field that cannot be served."""
    if not asked.prompt.strip():
        raise invalid("'prompt' must not be empty.", "prompt")
    if asked.response_format == "url":
        raise invalid("Images are not kept here, so there is no URL to give: ask for 'b64_json'.", "response_format")
    if asked.background == "transparent":
        raise invalid("This model draws no transparent backgrounds; ask for 'opaque' or 'auto'.", "background")
    if asked.partial_images and not asked.stream:
        raise invalid("'partial_images' needs 'stream': true.", "partial_images")
    for name in ("negative_prompt", "guidance_scale"):
        if getattr(asked, name) is not None and name not in can.arguments:
            raise invalid(f"This model takes no '{name}'.", name)
    width, height = _size(asked.size, can)
    factor, quality = _QUALITIES[asked.quality or "auto"]
    drawing = Drawing(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        images=asked.n or 1,
        width=width,
        height=height,
        steps=_steps(asked.num_inference_steps, factor, can),
        guidance_scale=can.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        seed=secrets.randbelow(2**32) if asked.seed is None else asked.seed,
        previews=asked.partial_images or 0,
    )
    return drawing, _look(asked, f"{width}x{height}", quality)


def _look(asked: ImageRequest, size: str, quality: str) -> Look:
    output_format = asked.output_format or "png"
    compression = 100 if asked.output_compression is None else asked.output_compression
    if output_format == "png" and compression != 100:
        raise invalid("PNG is lossless: 'output_compression' is for 'jpeg' and 'webp'.", "output_compression")
    return Look(size, quality, output_format, compression)


def _steps(asked: int | None, factor: float, can: Abilities) -> int | None:
    if asked is None:
        return can.steps and min(can.most_steps, max(1, round(can.steps * factor)))
    if asked > can.most_steps:
        raise invalid(f"'num_inference_steps' must be at most {can.most_steps}.", "num_inference_steps")
    return asked


def _size(asked: str | None, can: Abilities) -> tuple[int, int]:
    """Width and height in pixels. Raises ApiError (400) for a size the model cannot draw."""
    if asked in (None, "auto"):
        return can.width, can.height
    width, cross, height = asked.partition("x")
    # Five digits bound the arithmetic; more is beyond any model anyway.
    if not (cross and all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in (width, height))):
        raise _unsupported("'size' must be 'auto' or 'WIDTHxHEIGHT', such as '1024x1024'.")
    pixels = int(width), int(height)
    if any(side < can.multiple or side % can.multiple for side in pixels):
        raise _unsupported(f"'size': width and height must be positive multiples of {can.multiple} pixels.")
    if pixels[0] * pixels[1] > can.most_pixels:
        raise _unsupported(f"'size': at most {can.most_pixels} pixels (width times height) are drawn here.")
    return pixels


def _unsupported(message: str) -> Exception:
    return invalid(message, "size", "unsupported_size")
