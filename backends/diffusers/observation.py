"""What a running pipeline does, seen from outside: its steps, with their times and work, and the moment to stop it.

Every pipeline of Diffusers is a call that encodes text, runs its denoiser again and again, and decodes latents. Hooks
on the denoiser see each pass's shape, which is the work it does whatever the guidance; the pipeline's own callback,
where there is one, tells the end of a denoising step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from backends.diffusers.drawing import DrawingJob
from backends.steps import StepReporter

#: Names that pipelines give to the networks they denoise with.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


class Abandoned(Exception):
    """The client has hung up; raised inside the pipeline, which unwinds at once, whatever pipeline it is."""


class Observation:
    """Watches one call of a pipeline that draws `images` images of a job, and reports its steps.

    Between the marks of time that it sets no time is left out: text encoding is the first step, each denoising step is
    one, decoding is the last. Each image is a participant. A denoising step's work is latent pixels times passes;
    encoding counts the text's positions, decoding the latent pixels once.
    """

    def __init__(
        self,
        reporter: StepReporter,
        job: DrawingJob,
        images: int,
        device: torch.device,
        has_callback: bool,
    ) -> None:
        self.latent_pixels = 0
        self.steps = 0
        self._reporter = reporter
        self._requests = [job.request] * images
        self._device = device
        self._abandoned = job.abandoned
        self._has_callback = has_callback
        self._mark = time.monotonic_ns()
        self._tokens = 0

    @property
    def denoising(self) -> bool:
        """Whether the denoiser has run."""
        return self.latent_pixels > 0

    @contextlib.contextmanager
    def watching(self, pipeline: Any) -> Iterator[None]:
        """Observe the pipeline's call in this context."""
        hooks = [
            module.register_forward_pre_hook(self._before_pass, with_kwargs=True) for module in _denoisers(pipeline)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.step_done(self._tokens // len(self._requests) or self.latent_pixels)

    def step_done(self, tokens: int) -> None:
        """A step of `tokens` for each image ends now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or the step would end before its kernels
        now = time.monotonic_ns()
        count = len(self._requests)
        self._reporter.report(self._mark, now, self._requests, [max(1, tokens)] * count, [0] * count)
        self._mark, self._tokens = now, 0

    def denoised(self) -> None:
        """The pipeline tells the end of a denoising step."""
        self.check()
        self.steps += 1
        self.step_done(self._tokens // len(self._requests))

    def check(self) -> None:
        """Raises Abandoned if nobody waits for the images any more."""
        if self._abandoned.is_set():
            raise Abandoned

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check()
        latents: torch.Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        if not self.denoising:
            text = kwargs.get("encoder_hidden_states")
            self.step_done(text.shape[1] if isinstance(text, torch.Tensor) and text.ndim > 1 else 1)
            self.latent_pixels = _pixels(latents)
        elif not self._has_callback:
            self.denoised()
        self._tokens += latents.shape[0] * _pixels(latents)


def _pixels(latents: torch.Tensor) -> int:
    """Latent pixels of one image: of (batch, channels, height, width) or of packed (batch, patches, channels)."""
    return latents.shape[1] if latents.ndim == 3 else math.prod(latents.shape[2:])


def _denoisers(pipeline: Any) -> list[torch.nn.Module]:
    parts = (getattr(pipeline, name, None) for name in DENOISERS)
    return [part for part in parts if isinstance(part, torch.nn.Module)]


@contextlib.contextmanager
def estimates(scheduler: Any, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Give `take` what each step of the scheduler thinks the finished latents are, as far as it tells."""
    step = scheduler.step

    def observed(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = _flow_sigma(scheduler)
        result = step(model_output, timestep, sample, *args, **kwargs)
        estimate = _told(result) if sigma is None else sample - sigma.to(sample) * model_output
        if estimate is None:
            estimate = _by_noise_schedule(scheduler, model_output, timestep, sample)
        if estimate is not None and estimate.shape == sample.shape:
            take(estimate)
        return result

    observed.__wrapped__ = step  # type: ignore[attr-defined]  # pipelines look at the signature of `step`
    scheduler.step = observed
    try:
        yield
    finally:
        del scheduler.step


def _flow_sigma(scheduler: Any) -> torch.Tensor | None:
    """The noise level that a flow-matching scheduler is about to leave."""
    if "Flow" not in type(scheduler).__name__:
        return None
    return cast(torch.Tensor, scheduler.sigmas[scheduler.step_index or 0])


def _told(result: Any) -> torch.Tensor | None:
    """The finished latents as the scheduler itself tells them."""
    told = result[1] if isinstance(result, tuple) and len(result) > 1 else getattr(result, "pred_original_sample", None)
    return told if isinstance(told, torch.Tensor) else None


def _by_noise_schedule(
    scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> torch.Tensor | None:
    """The finished latents by the noise at `timestep`, where the scheduler keeps it and the model predicts as is."""
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None or model_output.shape != sample.shape:
        return None
    alpha: torch.Tensor = kept[int(timestep)].to(sample)
    if scheduler.config.get("prediction_type", "epsilon") == "v_prediction":
        return alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
    return (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt().clamp(min=1e-3)
