"""Transformers models as a backend: text classification; see `tasks.py` for how other tasks slot in. Loads no torch."""

from pathlib import Path

from backends.launching import COMMON, Option, launch
from backends.spec import BackendSpec, Launch, Task

OPTIONS = (
    *COMMON,
    Option("task", str, "what the model does", "classification", ("classification",)),
    Option("max-batch-tokens", int, "padded tokens of one forward pass", 8192),
    Option("max-batch-sequences", int, "sequences of one forward pass", 64),
    Option("max-queue", int, "sequences that may wait", 2048),
    Option("max-model-len", int, "longest input in tokens (default: what the model can)"),
)


class TransformersKind:
    tasks: tuple[Task, ...] = ("classification",)
    reports_steps = True

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch:
        """See `BackendKind.launch`. The socket reaches the engine through the environment that the supervisor makes."""
        del socket
        return launch(
            spec, port, "backends.transformers.server", OPTIONS, needs=("torch", "transformers", "safetensors")
        )


KIND = TransformersKind()
