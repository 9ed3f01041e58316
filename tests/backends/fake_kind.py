"""The stand-in engine as a kind of backend, for a supervisor of its own: `Supervisor(..., kinds=fake_kinds)`.

`args` of the spec become its flags: `args={"token-ms": 5, "no-steps": True}`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from backends.kinds import kind_of
from backends.spec import BackendError, BackendKind, BackendSpec, Launch, Task
from tests.backends import fake_engine


@dataclass(frozen=True)
class FakeKind:
    tasks: tuple[Task, ...] = ("chat", "classification", "image", "embedding")
    reports_steps: bool = True

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch | None:
        if spec.args.get("refuse"):
            raise BackendError(str(spec.args["refuse"]))
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in spec.args.items()]
        return Launch(
            (spec.python or sys.executable, fake_engine.__file__, f"--port={port}", f"--model={spec.name}", *flags)
        )


def fake_kinds(name: str) -> BackendKind:
    """The stand-in in the place of every engine; `remote` stays what it is."""
    return kind_of(name) if name == "remote" else FakeKind()
