"""The supervisor over real processes: the stand-in engine, killed, hung, broken and asked for its environment."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from backends.kinds import KINDS, kind_of
from backends.process import BackendProcess, cause_in, level_of
from backends.spec import BackendError, BackendSpec
from backends.steps import LoadingState, StepReceiver, StepReport
from backends.supervisor import BackendStatus, Pace, Supervisor
from tests.backends import fake_engine
from tests.backends.fake_kind import fake_kinds

QUICK = Pace(poll=0.02, watch=0.05, health_timeout=0.4, hung_after=2, grace=0.5, backoff=0.02, backoff_cap=0.1)


def spec(name: str = "chat", **fields: Any) -> BackendSpec:
    return BackendSpec(name=name, **{"kind": "vllm", **fields})


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jg-") as directory:
        yield Path(directory) / "run"


@asynccontextmanager
async def supervised(run_dir: Path, *specs: BackendSpec) -> AsyncIterator[tuple[Supervisor, list[BackendStatus]]]:
    changes: list[BackendStatus] = []
    supervisor = Supervisor(specs, run_dir=run_dir, on_change=changes.append, kinds=fake_kinds, pace=QUICK)
    await supervisor.start()
    try:
        yield supervisor, changes
    finally:
        await supervisor.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not true():  # noqa: ASYNC110 - what is waited for is not always an event of ours
            await asyncio.sleep(0.01)


async def ready(supervisor: Supervisor) -> None:
    async with asyncio.timeout(15):
        await supervisor.wait_ready()


async def ask(status: BackendStatus, path: str, body: Any = None) -> Any:
    async with aiohttp.ClientSession() as client:
        request = client.post(f"{status.url}{path}", json=body) if body else client.get(f"{status.url}{path}")
        async with request as response:
            return json.loads(await response.read())


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


async def test_a_backend_is_started_serves_and_is_ended(run_dir: Path) -> None:
    async with supervised(run_dir, spec()) as (supervisor, changes):
        await ready(supervisor)
        status = supervisor.statuses()["chat"]
        assert status.url
        assert (await ask(status, "/v1/models"))["data"][0]["id"] == "chat"
        assert supervisor.pids() == {"chat": status.pid}
        pid = status.pid or 0
        assert alive(pid)
    assert not alive(pid)
    assert [state for state, _ in groupby(change.state for change in changes)] == ["starting", "ready", "stopped"]
    assert changes[-1].url is None


async def test_a_killed_backend_is_restarted_and_the_others_go_on(run_dir: Path) -> None:
    async with supervised(run_dir, spec(), spec("other")) as (supervisor, changes):
        await ready(supervisor)
        before = supervisor.statuses()
        assert before["chat"].pid
        os.killpg(before["chat"].pid, signal.SIGKILL)
        await until(lambda: supervisor.statuses()["chat"].restarts == 1)
        await until(lambda: supervisor.statuses()["chat"].state == "ready")
        after = supervisor.statuses()
        assert after["chat"].pid != before["chat"].pid
        assert after["other"] == before["other"]
        assert (await ask(after["chat"], "/health"))["status"] == "ok"
    down = [change for change in changes if change.name == "chat" and change.state == "restarting"]
    assert down[-1].error == "killed by SIGKILL (out of memory?)"
    assert down[0].url is None


async def test_a_hung_backend_is_noticed_and_replaced(run_dir: Path) -> None:
    async with supervised(run_dir, spec()) as (supervisor, changes):
        await ready(supervisor)
        body = {"model": "chat", "messages": [{"role": "user", "content": "[[freeze]]"}]}
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask(supervisor.statuses()["chat"], "/v1/chat/completions", body)
        await until(lambda: supervisor.statuses()["chat"].restarts == 1)
        await until(lambda: supervisor.statuses()["chat"].state == "ready")
    assert "does not answer its health check" in next(str(c.error) for c in changes if c.state == "restarting")


async def test_one_that_cannot_start_says_why_in_one_line_and_does_not_stop_the_others(run_dir: Path) -> None:
    broken = spec("broken", args={"fail": "no model at /nowhere"})
    refused = spec("refused", args={"refuse": "there is no such file"})
    async with supervised(run_dir, broken, refused, spec()) as (supervisor, _):
        await until(lambda: supervisor.statuses()["chat"].state == "ready")
        await until(lambda: supervisor.statuses()["broken"].restarts >= 2)
        statuses = supervisor.statuses()
        assert statuses["broken"].error == "ended with exit code 1: RuntimeError: no model at /nowhere"
        assert statuses["refused"].error == "there is no such file"
        assert statuses["broken"].state in {"failed", "starting"}
        assert statuses["chat"].state == "ready"


async def test_a_gpu_that_is_not_there_is_named(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr("backends.supervisor.NVIDIA_GPUS", tmp_path)
    async with supervised(run_dir, spec("there", devices=(0,)), spec(devices=(0, 1))) as (supervisor, _):
        await until(lambda: supervisor.statuses()["chat"].state == "failed")
        await until(lambda: supervisor.statuses()["there"].state == "ready")
        assert supervisor.statuses()["chat"].error == "chat: there is no GPU 1: this machine has 1, numbered from 0"


async def test_a_death_is_noticed_though_a_child_of_its_own_lives_on(run_dir: Path) -> None:
    script = (
        "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); sys.exit('ERROR: gone')"
    )
    process = await BackendProcess.start("chat", [sys.executable, "-c", script], dict(os.environ))
    async with asyncio.timeout(15):
        assert await process.ended() == "ended with exit code 1"
        assert await process.cause() == "ended with exit code 1: gone"
        await process.stop(0.1)
    for child in psutil.process_iter(["cmdline"]):
        if child.info["cmdline"] == ["sleep", "600"]:
            child.kill()


async def test_an_interpreter_that_does_not_exist_is_named(run_dir: Path) -> None:
    async with supervised(run_dir, spec(python="/nowhere/python")) as (supervisor, _):
        await until(lambda: "cannot run /nowhere/python" in str(supervisor.statuses()["chat"].error))
        assert supervisor.statuses()["chat"].state in {"failed", "starting"}


async def test_one_that_takes_too_long_is_given_up_and_tried_again(run_dir: Path) -> None:
    slow = spec(args={"start-seconds": 600}, startup_seconds=0.3)
    async with supervised(run_dir, slow) as (supervisor, _):
        await until(lambda: supervisor.statuses()["chat"].restarts >= 1)
        assert str(supervisor.statuses()["chat"].error).startswith("not ready after 0.3 s")


async def test_no_process_outlives_a_proxy_that_is_killed_outright(run_dir: Path) -> None:
    script = textwrap.dedent(
        f"""
        import asyncio, pathlib
        from backends.spec import BackendSpec
        from backends.supervisor import Supervisor
        from tests.backends.fake_kind import fake_kinds

        async def main():
            spec = BackendSpec(name="chat", kind="vllm")
            supervisor = Supervisor(
                [spec], run_dir=pathlib.Path({str(run_dir)!r}), on_change=lambda status: None, kinds=fake_kinds)
            await supervisor.start()
            await supervisor.wait_ready()
            print(supervisor.pids()["chat"], flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    root = Path(fake_engine.__file__).parents[2]
    proxy = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert proxy.stdout
    pid = int(await proxy.stdout.readline())
    assert alive(pid)
    proxy.kill()
    await proxy.wait()
    await until(lambda: not alive(pid))


async def test_its_environment_has_its_devices_but_none_of_the_proxys_secrets(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOULEGATE_ADMIN_KEY", "a")
    monkeypatch.setenv("OPENAI_API_KEY", "b")
    monkeypatch.setenv("ELECTRICITY_MAPS_TOKEN", "c")
    monkeypatch.setenv("PGPASSWORD", "d")
    monkeypatch.setenv("HF_TOKEN", "needed")
    async with supervised(run_dir, spec(devices=(1, 0)), spec("cpu")) as (supervisor, _):
        await ready(supervisor)
        gpu, cpu = (psutil.Process(supervisor.pids()[name]).environ() for name in ("chat", "cpu"))
    assert not {"JOULEGATE_ADMIN_KEY", "OPENAI_API_KEY", "ELECTRICITY_MAPS_TOKEN", "PGPASSWORD"} & set(gpu)
    assert gpu["HF_TOKEN"] == "needed"
    assert gpu["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert gpu["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert gpu["JOULEGATE_DEVICES"] == "gpu:1,gpu:0"
    assert cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert cpu["JOULEGATE_DEVICES"] == "host"


async def test_its_steps_reach_the_supervisors_socket(run_dir: Path) -> None:
    steps: list[StepReport] = []
    states: list[LoadingState] = []
    async with supervised(run_dir, spec(devices=(0,))) as (supervisor, _):
        receiver = StepReceiver(
            supervisor.steps_socket,
            backends=["chat"],
            on_steps=lambda _, reports: steps.extend(reports),
            on_loss=lambda *_: pytest.fail("steps were lost"),
            on_state=lambda _, state: states.append(state),
        )
        await receiver.start()
        await ready(supervisor)
        body = {"model": "chat", "messages": [{"role": "user", "content": "one two three [[tokens=5]]"}]}
        answer = await ask(supervisor.statuses()["chat"], "/v1/chat/completions", body)
        await until(lambda: len(steps) == 5)
        await receiver.close()
    usage = answer["usage"]
    assert sum(step.tokens[0] for step in steps) == usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert steps[-1].contexts == [usage["prompt_tokens"] + usage["completion_tokens"] - 1]
    assert steps[0].devices == ("gpu:0",)
    assert [state.loading for state in states] == [True, False]


async def test_its_logs_are_passed_on_with_its_name_and_their_level(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with supervised(run_dir, spec(args={"fail": "oh no"})) as (supervisor, _):
            await until(lambda: supervisor.statuses()["chat"].state == "failed")
    lines = [record.getMessage() for record in caplog.records if record.name == "backends.chat"]
    assert "chat: RuntimeError: oh no" in lines


async def test_a_remote_is_watched_by_its_url(run_dir: Path) -> None:
    async with supervised(run_dir / "a", spec()) as (engine, _):
        await ready(engine)
        url = engine.statuses()["chat"].url
        async with supervised(run_dir / "b", spec("far", kind="remote", url=f"{url}/v1/")) as (supervisor, _):
            await ready(supervisor)
            assert supervisor.statuses()["far"].url == url
            assert supervisor.pids() == {}
            await engine.close()
            await until(lambda: supervisor.statuses()["far"].state == "failed")
            assert f"does not answer at {url}/health" in str(supervisor.statuses()["far"].error)


async def test_a_remote_without_a_url_says_so(run_dir: Path) -> None:
    async with supervised(run_dir, spec("far", kind="remote")) as (supervisor, _):
        await until(lambda: supervisor.statuses()["far"].state == "failed")
        assert "needs url" in str(supervisor.statuses()["far"].error)


def test_every_kind_that_is_there_can_be_asked_and_no_other() -> None:
    assert "remote" in KINDS
    assert kind_of("remote").tasks
    with pytest.raises(BackendError, match="'os'"):
        kind_of("os")


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("INFO 11-23 10:00:00 [core.py:1] hello", logging.INFO),
        ("(EngineCore pid=7) WARNING 11-23 [x.py:1] careful", logging.WARNING),
        ("ERROR:    bad", logging.ERROR),
        ("0.00.123.456 E srv  load: bad", logging.ERROR),
        ("0.00.123.456 I srv  load: good", logging.INFO),
        ("Loading weights:  50%", logging.INFO),
    ],
)
def test_the_level_of_a_line_is_kept(line: str, level: int) -> None:
    assert level_of(line) == level


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["Traceback (most recent call last):", "  raise E", "a.b.MyError: it broke"], "a.b.MyError: it broke"),
        (
            [
                "(EngineCore pid=7) ERROR 11-23 [core.py:5] ValueError: No available memory for the cache blocks.",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "ValueError: No available memory for the cache blocks.",
        ),
        (
            [
                "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "(APIServer pid=7)   Value error, max_model_len (9) is greater than 8 [type=value_error, input=1]",
                "(APIServer pid=7)     For further information visit https://errors.pydantic.dev/2.14/v/value_error",
            ],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
            "Value error, max_model_len (9) is greater than 8",
        ),
        (
            [
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, Invalid repository ID or local directory specified: '/models/none'.",
                "Please verify the following requirements:",
                "1. Specify a local directory with a 'config.json'.",
                " [type=value_error, input_value=ArgsKwargs((), {'model': 1}), input_type=ArgsKwargs]",
                "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
            ],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
            "Value error, Invalid repository ID or local directory specified: '/models/none'. "
            "Please verify the following requirements: 1. Specify a local directory with a 'config.json'.",
        ),
        (
            [
                "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig",
                "(APIServer pid=7) gpu_memory_utilization",
                "(APIServer pid=7)   Input should be less than or equal to 1 [type=less_than_equal, input_value=2]",
            ],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig: "
            "gpu_memory_utilization Input should be less than or equal to 1",
        ),
        (["serve: error: unrecognized arguments: --nonsense"], "serve: error: unrecognized arguments: --nonsense"),
        ([], ""),
    ],
)
def test_the_cause_of_a_failure_is_found_in_its_log(lines: list[str], cause: str) -> None:
    assert cause_in(lines) == cause


async def test_backends_come_and_go_while_the_others_run(run_dir: Path) -> None:
    async with supervised(run_dir, spec("chat")) as (supervisor, changes):
        await ready(supervisor)
        stays = supervisor.pids()["chat"]
        supervisor.add(spec("other"))
        await ready(supervisor)
        goes = supervisor.pids()["other"]
        assert alive(goes)
        await supervisor.remove("other")
        assert not alive(goes)
        assert (changes[-1].name, changes[-1].state, changes[-1].pid) == ("other", "stopped", None)
        assert supervisor.pids() == {"chat": stays}
        supervisor.suspect("other")
        supervisor.unwatched("other", "no reason")


async def test_one_that_is_removed_as_all_end_has_its_grace_and_is_gone(run_dir: Path) -> None:
    async with supervised(run_dir, spec("chat")) as (supervisor, _):
        await ready(supervisor)
        pid = supervisor.pids()["chat"]
        removing = asyncio.create_task(supervisor.remove("chat"))
        await asyncio.sleep(0)
    await removing
    assert not alive(pid)
