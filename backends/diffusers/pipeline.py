"""Any text-to-image pipeline, loaded and run. Imported on the engine's thread only, since it imports torch."""

import argparse
import contextlib
import importlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL.Image import Image

from backends.diffusers.drawing import Drawing, DrawingJob, Drawn, Order, Preview, Progress
from backends.diffusers.observation import DENOISERS, Abandoned, Observation, estimates
from backends.diffusers.schema import Abilities
from backends.serving import invalid
from backends.spec import BackendError
from backends.steps import StepReporter

logger = logging.getLogger(__name__)

#: Pipeline classes of our own, which Diffusers does not know by name, and their modules.
OWN: Mapping[str, str] = {"PainterPipeline": "backends.starter.painter_pipeline"}

_WARM_UP_STEPS = 2


def load(arguments: argparse.Namespace, reporter: StepReporter) -> "ImageEngine":
    """Load the pipeline. Raises BackendError or what Diffusers raises."""
    # Their warnings quote the part of a prompt that is too long for the text encoder.
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    pipeline = _pipeline_class(arguments).from_pretrained(
        arguments.model,
        use_safetensors=True,
        dtype=_dtype(arguments),
        variant=arguments.variant,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    _check_kind(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return ImageEngine(pipeline.to(arguments.device), arguments, reporter)


def _pipeline_class(arguments: argparse.Namespace) -> Any:
    """Diffusers' loader, or the class of our own that the model's index names. Raises BackendError for others'."""
    index = Path(arguments.model) / "model_index.json"
    if not index.is_file():
        return diffusers.DiffusionPipeline  # on the hub, or not a pipeline, which it says best
    name = json.loads(index.read_text()).get("_class_name")
    if isinstance(name, str) and name in OWN:
        return getattr(importlib.import_module(OWN[name]), name)
    if not isinstance(name, str) and not arguments.trust_remote_code:
        raise BackendError(f"its pipeline {name} is code of its own: set trust_remote_code if you trust its author")
    if isinstance(name, str) and not hasattr(diffusers, name):
        raise BackendError(
            f"its pipeline class {name!r} is not in diffusers {diffusers.__version__}: a newer one may help"
        )
    return diffusers.DiffusionPipeline


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    if arguments.dtype != "auto":
        return getattr(torch, arguments.dtype)  # type: ignore[no-any-return]  # the flag's choices are dtypes
    if arguments.device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _check_kind(pipeline: Any) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters
    image = parameters.get("image")
    if "prompt" not in parameters or (image is not None and image.default is inspect.Parameter.empty):
        raise BackendError(f"{type(pipeline).__name__} is not a text-to-image pipeline: name one that is")


class ImageEngine:
    """Draws one request at a time, its images together as far as `max-batch-images` allows."""

    def __init__(self, pipeline: Any, arguments: argparse.Namespace, reporter: StepReporter) -> None:
        self._pipeline = pipeline
        self._reporter = reporter
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self._has_callback = "callback_on_step_end" in self._parameters
        self._most_together = arguments.max_batch_images if "num_images_per_prompt" in self._parameters else 1
        self.abilities = _abilities(pipeline, self._parameters, arguments)

    def warm_up(self) -> None:
        size = self.abilities.width, self.abilities.height
        drawing = Drawing("warm up", None, 1, *size, _WARM_UP_STEPS, self.abilities.guidance_scale, seed=0, previews=0)
        self.run([DrawingJob("", Order(drawing))])

    def pick(self, sizes: Sequence[int]) -> list[int]:
        del sizes
        return [0]

    def run(self, jobs: Sequence[DrawingJob]) -> None:
        for job in jobs:
            with contextlib.suppress(Abandoned):
                job.future.set_result(self._draw(job))

    def _draw(self, job: DrawingJob) -> Drawn:
        drawing = job.work.drawing
        images: list[Image] = []
        latent_pixels = 0
        while len(images) < drawing.images:
            count = min(self._most_together, drawing.images - len(images))
            part = replace(drawing, images=count, seed=drawing.seed + len(images))
            drawn, latent_pixels = self._call(job, part, done=len(images))
            images += drawn
        return Drawn(images, self._text_tokens(drawing.prompt), latent_pixels)

    def _call(self, job: DrawingJob, part: Drawing, done: int) -> tuple[list[Image], int]:
        """Draw the images of `part` together, `done` others being drawn: the images, and the latent pixels of one."""
        pipeline = self._pipeline
        seen = Observation(self._reporter, job, part.images, pipeline._execution_device, self._has_callback)
        teller = _Teller(pipeline, job.work, part, seen, done)
        try:
            with seen.watching(pipeline), teller.listening():
                return list(pipeline(**self._arguments(part, teller)).images), seen.latent_pixels
        except ValueError as error:
            if seen.denoising:
                raise
            raise invalid(f"The model refuses this request: {str(error)[:500]}") from None

    def _arguments(self, part: Drawing, teller: "_Teller") -> dict[str, Any]:
        seeds = range(part.seed, part.seed + part.images)
        wanted: dict[str, Any] = {
            "negative_prompt": part.negative_prompt,
            "num_inference_steps": part.steps,
            "guidance_scale": part.guidance_scale,
            "num_images_per_prompt": part.images,
            "callback_on_step_end": teller.step_ended,
        }
        return {
            "prompt": part.prompt,
            "width": part.width,
            "height": part.height,
            # On the CPU, so that a seed draws the same image whatever the device and the company.
            "generator": [torch.Generator().manual_seed(seed % 2**63) for seed in seeds],
            "output_type": "pil",
            **{name: value for name, value in wanted.items() if value is not None and name in self._parameters},
        }

    def _text_tokens(self, prompt: str) -> int:
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        return len(tokenizer(prompt, truncation=True).input_ids) if tokenizer is not None else 0


class _Teller:
    """Ends the steps of one call, and tells its progress and previews to whoever ordered it."""

    def __init__(self, pipeline: Any, order: Order, part: Drawing, seen: Observation, done: int) -> None:
        self._pipeline = pipeline
        self._tell = order.tell
        self._part = part
        self._seen = seen
        self._calls_before = done
        self._images_in_all = order.drawing.images
        self._estimate: torch.Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if not self._part.previews:
            yield
            return
        with estimates(self._pipeline.scheduler, self._keep):
            yield

    def _keep(self, estimate: torch.Tensor) -> None:
        self._estimate = estimate

    def step_ended(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Diffusers' `callback_on_step_end`."""
        del timestep
        self._seen.denoised()
        steps = len(pipeline.scheduler.timesteps)
        self._tell(self._progress(index + 1, steps))
        due = preview_steps(steps, self._part.previews)
        if index + 1 in due:
            self._preview(tensors["latents"], due.index(index + 1))
        return {}

    def _progress(self, step: int, steps: int) -> Progress:
        images_done = self._calls_before * steps + step * self._part.images
        return Progress(images_done // self._images_in_all, steps)

    def _preview(self, latents: torch.Tensor, index: int) -> None:
        estimate = self._estimate if self._estimate is not None else latents
        images = decoded(self._pipeline, estimate, self._part)
        self._seen.step_done(self._seen.latent_pixels)
        for image in images:
            self._tell(Preview(index, image))


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which of `steps` steps (from 1) to show `previews` previews: evenly, and none after the last."""
    spread = (round(steps * (index + 1) / (previews + 1)) for index in range(previews))
    return sorted({step for step in spread if 0 < step < steps})


def decoded(pipeline: Any, latents: torch.Tensor, part: Drawing) -> list[Image]:
    """The images that latents stand for; none where the pipeline has no way to tell."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return _pictures(pipeline.decode_latents(latents), part) if hasattr(pipeline, "decode_latents") else []
    if hasattr(pipeline, "_unpack_latents"):
        latents = pipeline._unpack_latents(latents, part.height, part.width, pipeline.vae_scale_factor)
    if latents.ndim != 4 or not hasattr(pipeline, "image_processor"):
        return []
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    pixels = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return list(pipeline.image_processor.postprocess(pixels, output_type="pil"))


def _pictures(pixels: torch.Tensor, part: Drawing) -> list[Image]:
    """Images of the asked size from pixels in [0, 1], shape (batch, 3, height, width)."""
    images = diffusers.image_processor.VaeImageProcessor(do_normalize=False).postprocess(pixels, output_type="pil")
    return [image.resize((part.width, part.height)) for image in images]


def _abilities(pipeline: Any, parameters: Mapping[str, Any], arguments: argparse.Namespace) -> Abilities:
    width, height, multiple = _sizes(pipeline)
    steps = parameters.get("num_inference_steps")
    default = steps.default if steps is not None and isinstance(steps.default, int) else None
    return Abilities(
        width=width,
        height=height,
        multiple=multiple,
        most_pixels=max(arguments.max_image_pixels, width * height),
        most_steps=arguments.max_steps,
        steps=arguments.steps or default,
        guidance_scale=arguments.guidance_scale,
        arguments=frozenset(parameters),
    )


def _sizes(pipeline: Any) -> tuple[int, int, int]:
    """The width and height that a pipeline draws by itself, and what its sides must be multiples of; all in pixels."""
    if native := getattr(pipeline, "native_size", None):
        return native, native, 1
    denoiser = next(part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None)
    scale = getattr(pipeline, "vae_scale_factor", 8)
    sample = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size") or 64
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    # Transformers see latents in patches of two by two.
    multiple = scale * 2 if hasattr(pipeline, "transformer") else scale
    return width * scale, height * scale, multiple
