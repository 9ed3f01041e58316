"""The kinds of backends, each a folder here, imported when it is asked for."""

import importlib
from typing import cast, get_args

from backends.spec import BackendError, BackendKind, Kind

KINDS: tuple[str, ...] = get_args(Kind)


def kind_of(name: str) -> BackendKind:
    """What the folder `backends/<name>` offers; loads no engine. Raises BackendError for a name there is not."""
    if name not in KINDS:
        raise BackendError(f"no kind of backend is called {name!r}; there are {', '.join(KINDS)}")
    return cast(BackendKind, importlib.import_module(f"backends.{name}").KIND)
