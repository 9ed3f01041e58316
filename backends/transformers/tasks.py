"""The tasks a Transformers model can be served for; a new one is a new entry: how it loads, what paths it answers."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backends.serving import Engine, Handler, Host
from backends.steps import StepReporter
from backends.transformers import classification


@dataclass(frozen=True, slots=True)
class TaskServer:
    """`load` runs on the engine's thread and is the first to import torch; `posts` gives a handler for each path."""

    load: Callable[[argparse.Namespace, StepReporter], Engine[Any]]
    posts: Callable[[Host[Any], argparse.Namespace], Mapping[str, Handler]]


TASKS: Mapping[str, TaskServer] = {
    "classification": TaskServer(classification.load, classification.posts),
}
