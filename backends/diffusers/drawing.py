"""A drawing on its way through the engine, as plain data. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backends.serving import Job

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Drawing:
    """What to draw; None leaves it to the pipeline. Image i has the seed `seed` + i."""

    prompt: str
    negative_prompt: str | None
    images: int
    width: int
    height: int
    steps: int | None
    guidance_scale: float | None
    seed: int
    previews: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `steps` denoising steps are done."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What an image would be if the drawing ended now; `index` is the how-manieth preview of its image."""

    index: int
    image: "Image"


@dataclass(frozen=True, slots=True)
class Drawn:
    """The finished images, with the tokens of their prompt and the latent pixels of one image."""

    images: "list[Image]"
    text_tokens: int
    latent_pixels: int


@dataclass(frozen=True, slots=True)
class Order:
    """A drawing, and whom to tell about it while it is made; `tell` is called on the engine's thread."""

    drawing: Drawing
    tell: Callable[[Progress | Preview], None] = lambda _: None


DrawingJob = Job[Order, Drawn]
