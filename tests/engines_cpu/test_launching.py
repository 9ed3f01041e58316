"""From a configured backend to its process: what is refused before the start, and what at loading."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.diffusers import KIND as DIFFUSERS
from backends.process import environment_of
from backends.spec import BackendError, BackendKind, BackendSpec
from backends.transformers import KIND as TRANSFORMERS
from tests.engines_cpu.conftest import PATIENCE, ROOT, Server

SOCKET = Path("/nonexistent/steps")


def command_of(spec: BackendSpec) -> list[str]:
    kinds: dict[str, BackendKind] = {"transformers": TRANSFORMERS, "diffusers": DIFFUSERS}
    launch = kinds[spec.kind].launch(spec, 1234, SOCKET)
    assert launch is not None
    return list(launch.command)


def test_args_become_flags_in_either_spelling() -> None:
    spec = BackendSpec(
        "s", "transformers", model="some/model", args={"max-batch-tokens": 512, "max_queue": 9, "dtype": "bfloat16"}
    )
    command = command_of(spec)
    assert command[:3] == [sys.executable, "-m", "backends.transformers.server"]
    assert command[-3:] == ["--max-batch-tokens=512", "--max-queue=9", "--dtype=bfloat16"]
    assert command[command.index("--model") + 1] == "some/model"
    assert command[command.index("--device") + 1] == "cpu"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"colour": "blue"}, "args.colour"),
        ({"dtype": "int3"}, "args.dtype"),
        ({"max-queue": "many"}, "args.max-queue"),
        ({"max-queue": True}, "args.max-queue"),
        ({"max-queue": 0}, "args.max-queue"),
        ({"max-queue": 2.5}, "args.max-queue"),
        ({"guidance-scale": -1.0}, "args.guidance-scale"),
        ({"trust-remote-code": True}, "args.trust-remote-code"),
        ({"port": 1}, "args.port"),
    ],
)
def test_a_wrong_arg_is_refused_by_name_in_one_line(args: dict[str, Any], named: str) -> None:
    with pytest.raises(BackendError) as caught:
        command_of(BackendSpec("p", "diffusers", model="some/model", args=args))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [None, "./missing", "/missing", "~/missing", "starter:missing"])
def test_a_model_that_is_not_there_is_refused_before_the_start(model: str | None) -> None:
    with pytest.raises(BackendError, match="model"):
        command_of(BackendSpec("s", "transformers", model=model))


def test_a_folder_is_given_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "some") in command_of(BackendSpec("s", "transformers", model="some"))


def test_a_gpu_is_the_only_one_its_process_sees() -> None:
    spec = BackendSpec("s", "diffusers", model="some/model", devices=(2,), trust_remote_code=True)
    launch = DIFFUSERS.launch(spec, 1234, SOCKET)
    assert environment_of(spec, launch, SOCKET, ROOT)["CUDA_VISIBLE_DEVICES"] == "2"
    assert launch.command[launch.command.index("--device") + 1] == "cuda:0"
    assert "--trust-remote-code" in launch.command
    with pytest.raises(BackendError, match="one device"):
        command_of(BackendSpec("s", "diffusers", model="some/model", devices=(0, 1)))


def test_the_kinds_load_no_torch() -> None:
    code = "import sys, backends.transformers, backends.diffusers; assert not {'torch', 'starlette'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_that_cannot_be_served_end_the_process_with_one_clear_line(tiny: Path, tmp_path: Path) -> None:
    """Pickled weights, no head, code of its own; all at once, since each process takes seconds."""
    index = json.loads((tiny / "stable_diffusion" / "model_index.json").read_text())
    own_code = tmp_path / "own_code"
    own_code.mkdir()
    (own_code / "model_index.json").write_text(json.dumps({**index, "_class_name": ["evil", "Pipeline"]}))
    (own_code / "evil.py").write_text("raise SystemExit('ran')")
    specs = {
        "safetensors": BackendSpec("m", "transformers", model=str(tiny / "pickled")),
        "trained for this task": BackendSpec("m", "transformers", model=str(tiny / "headless")),
        "trust_remote_code": BackendSpec("m", "diffusers", model=str(own_code)),
    }
    servers = {}
    for number, (said, spec) in enumerate(specs.items()):
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        servers[said] = Server(spec, directory)
    try:
        codes = {said: server.process.wait(PATIENCE) for said, server in servers.items()}
        logs = {said: server.log.read_text() for said, server in servers.items()}
    finally:
        for server in servers.values():
            server.close()
    assert codes == dict.fromkeys(specs, 1)
    for said, log in logs.items():
        assert said in log.splitlines()[-1], log
        assert "Traceback" not in log
