"""Diffusers pipelines as a backend: text to image. Loads no torch."""

from pathlib import Path

from backends.launching import COMMON, Option, launch
from backends.spec import BackendSpec, Launch, Task

OPTIONS = (
    *COMMON,
    Option("variant", str, "variant of the weight files, such as fp16"),
    Option("max-queue", int, "requests that may wait", 32),
    Option("max-batch-images", int, "images of one request that are drawn together", 4),
    Option("max-image-pixels", int, "most pixels of an image", 2048 * 2048),
    Option("max-steps", int, "most denoising steps a request may ask for", 200),
    Option("steps", int, "denoising steps when a request names none (default: the pipeline's)"),
    Option("guidance-scale", float, "guidance when a request names none (default: the pipeline's)", least=0),
)


class DiffusersKind:
    tasks: tuple[Task, ...] = ("image",)
    reports_steps = True

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch:
        """See `BackendKind.launch`. The socket reaches the engine through the environment that the supervisor makes."""
        del socket
        needs = ("torch", "diffusers", "transformers", "safetensors", "PIL")
        return launch(spec, port, "backends.diffusers.server", OPTIONS, needs)


KIND = DiffusersKind()
