"""What the kinds that start an engine server of ours share: options, models, and the command. Loads no engine."""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends.starter
from backends.spec import BackendError, BackendSpec, Launch

STARTER = "starter:"


@dataclass(frozen=True, slots=True)
class Option:
    """One flag of an engine server, which is also one key of a backend's `args`: `max-queue` and `--max-queue`."""

    name: str
    type: type[int] | type[float] | type[str]
    help: str
    default: int | float | str | None = None
    choices: tuple[str, ...] = ()
    least: int = 1


#: What every engine server of ours takes.
COMMON = (
    Option("dtype", str, "number format of the weights", "auto", ("auto", "float32", "bfloat16", "float16")),
    Option("revision", str, "branch, tag or commit on the hub"),
    Option("threads", int, "CPU threads (default: the usable cores but one, at most 8)"),
    Option("max-body-bytes", int, "largest request body", 8 * 2**20),
)


#: Quiet libraries: their warnings quote inputs, and one process does not need threads for tokenizing.
_ENVIRONMENT: Mapping[str, str] = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


def parser(prog: str, options: Sequence[Option]) -> argparse.ArgumentParser:
    """The command line of an engine server with these options."""
    result = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    result.add_argument("--model", required=True, help="folder, or id on the Hugging Face hub")
    result.add_argument("--name", required=True, help="the public name of the model")
    result.add_argument("--port", required=True, type=int, help="port on 127.0.0.1")
    result.add_argument("--device", default="cpu", help="cpu, or a GPU as torch names it")
    result.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    for option in options:
        result.add_argument(
            f"--{option.name}",
            type=option.type,
            default=option.default,
            choices=option.choices or None,
            help=option.help,
        )
    return result


def launch(spec: BackendSpec, port: int, module: str, options: Sequence[Option], needs: Sequence[str]) -> Launch:
    """The command that starts `module` for `spec`. Raises BackendError; `needs` are the packages it imports."""
    if not spec.model:
        raise BackendError(
            f"{spec.name}: a {spec.kind} backend needs `model`: a folder or an id on the Hugging Face hub"
        )
    if len(spec.devices) > 1:
        raise BackendError(f"{spec.name}: a {spec.kind} backend runs on one device, not on {len(spec.devices)}")
    _check_installed(spec, needs)
    command = [
        *(spec.python or sys.executable, "-m", module),
        *("--model", resolve_model(spec), "--name", spec.name, "--port", str(port)),
        *("--device", "cuda:0" if spec.devices else "cpu"),
        *(["--trust-remote-code"] if spec.trust_remote_code else []),
        *flags(spec, options),
    ]
    return Launch(tuple(command), _ENVIRONMENT)


def resolve_model(spec: BackendSpec) -> str:
    """The absolute folder that `spec.model` names (`starter:NAME`: a model that ships with us), else the hub id."""
    model = spec.model or ""
    if model.startswith(STARTER):
        return _folder(spec, Path(backends.starter.__file__).parent / model.removeprefix(STARTER))
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) or path.is_dir():
        return _folder(spec, path)
    return model


def flags(spec: BackendSpec, options: Sequence[Option]) -> list[str]:
    """`spec.args` as flags, `_` for `-` allowed. Raises BackendError for an unknown one and for a wrong value."""
    known = {option.name: option for option in options}
    result = []
    for key, value in spec.args.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise BackendError(
                f"{spec.name}: args.{key}: unknown; a {spec.kind} backend takes {', '.join(sorted(known))}"
            )
        result.append(f"--{option.name}={_checked(spec, key, option, value)}")
    return result


def _checked(spec: BackendSpec, key: str, option: Option, value: Any) -> Any:
    wanted = f"one of {', '.join(option.choices)}" if option.choices else _KINDS[option.type]
    right = isinstance(value, option.type) or (option.type is float and isinstance(value, int))
    if not right or isinstance(value, bool) or (option.choices and value not in option.choices):
        raise BackendError(f"{spec.name}: args.{key}: must be {wanted}, not {value!r}")
    if option.type is not str and value < option.least:
        raise BackendError(f"{spec.name}: args.{key}: must be at least {option.least}, not {value!r}")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a string"}


def _folder(spec: BackendSpec, path: Path) -> str:
    if not path.is_dir():
        raise BackendError(f"{spec.name}: model: there is no folder {path}")
    return str(path.resolve())


def _check_installed(spec: BackendSpec, needs: Sequence[str]) -> None:
    if spec.python:
        return  # an environment of its own, which only its own interpreter can look into
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        cure = f"pip install 'joulegate[{spec.kind}]'"
        raise BackendError(f"{spec.name}: a {spec.kind} backend needs {' and '.join(missing)}: {cure}")
