"""The vLLM backend without vLLM: its command line, its probe, and its step reporter over a scheduler like vLLM's.

The same over a real vLLM is in tests/engines.
"""

import json
import re
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.spec import BackendError, BackendSpec, Launch
from backends.steps import StepReceiver, StepReport
from backends.vllm import KIND, reporter
from tests.backends.test_steps import until

ID = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


def interpreter(folder: Path, **told: Any) -> str:
    """A python whose environment has the vLLM we say."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nprint({json.dumps(json.dumps({'module': True, **told}))})\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture
def python(tmp_path: Path) -> str:
    return interpreter(tmp_path, version="0.32.0", missing=[])


def spec(**fields: Any) -> BackendSpec:
    return BackendSpec(**{"name": "chat", "kind": "vllm", "model": "org/model", **fields})


def launch(**fields: Any) -> Launch:
    found = KIND.launch(spec(**fields), 8123, Path("/none"))
    assert found
    return found


def test_vllm_listens_on_this_machine_only_and_reports_its_steps(python: str) -> None:
    command = " ".join(launch(python=python).command)
    for flag in (
        "--host=127.0.0.1 --port=8123 --served-model-name=chat",
        "--scheduler-cls=backends.vllm.reporter.scheduler",
        "--enable-prompt-tokens-details",
        "--allowed-media-domains media.invalid",
        "--load-format=safetensors",
    ):
        assert flag in command
    assert "--trust-remote-code" not in command
    assert "--trust-remote-code" in launch(python=python, trust_remote_code=True).command


def test_a_vllm_without_the_servers_module_is_started_by_its_command(tmp_path: Path) -> None:
    command = launch(python=interpreter(tmp_path, version="0.40", missing=[], module=False)).command
    assert command[1:5] == ("-m", "vllm.entrypoints.cli.main", "serve", "org/model")


def test_arguments_become_vllms_flags(python: str) -> None:
    args = {
        "max_model_len": 8192,
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "hf-overrides": {"a": 1},
        "allowed-media-domains": ["example.org", "example.com"],
    }
    command = " ".join(launch(python=python, args=args).command)
    assert "--max-model-len=8192" in command
    assert "--enforce-eager" in command
    assert "--no-enable-prefix-caching" in command
    assert '--hf-overrides={"a": 1}' in command
    assert "--allowed-media-domains example.org example.com" in command
    assert "media.invalid" not in command


def test_several_devices_mean_tensor_parallelism_unless_the_arguments_say_otherwise(python: str) -> None:
    assert "--tensor-parallel-size=2" in launch(python=python, devices=(0, 1)).command
    command = " ".join(launch(python=python, devices=(0, 1), args={"data-parallel-size": 2}).command)
    assert "--data-parallel-size=2" in command
    assert "--tensor-parallel-size" not in command


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "needs model"),
        ({"model": "/nowhere/model"}, "there is no model at /nowhere/model"),
        ({"args": {"port": 1}}, "args.port is set by joulegate"),
        ({"args": {"scheduler_cls": "x"}}, "args.scheduler-cls is set by joulegate"),
        ({"args": {"trust-remote-code": True}}, "trust_remote_code: true"),
        ({"devices": (0, 1), "args": {"tensor-parallel-size": 4}}, "need 4 devices, not 2"),
        ({"python": "/nowhere/python"}, "cannot ask /nowhere/python"),
    ],
)
def test_what_cannot_be_started_is_named_in_one_line(python: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=re.escape(message)) as caught:
        launch(**{"python": python, **fields})
    assert "\n" not in str(caught.value)


def test_an_environment_without_vllm_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="vLLM is not installed"):
        launch(python=interpreter(tmp_path, version="", missing=["vllm"]))


def test_a_vllm_without_the_hook_is_served_unwatched_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = launch(python=interpreter(tmp_path, version="0.99", missing=["--scheduler-cls in engine/arg_utils.py"]))
    assert not any("scheduler-cls" in word for word in found.command)
    assert not found.reports_steps
    assert "measured-tokens" in caplog.text
    assert "tested with vLLM 0.32" in caplog.text


# --- the reporter, over a scheduler that keeps vLLM's books ---


@dataclass
class Output:
    num_scheduled_tokens: dict[str, int]


class Scheduler:
    """vLLM's scheduler as far as the reporter knows it: `plan` is what each batch computes."""

    def __init__(self, vllm_config: Any, *, log_stats: bool = False) -> None:
        self.requests: dict[str, Any] = {}
        self.plan: list[dict[str, int]] = []
        self.log_stats = log_stats

    def schedule(self, throttle_prefills: bool = False) -> Output:
        tokens = self.plan.pop(0)
        for name, count in tokens.items():
            self.requests.setdefault(name, SimpleNamespace(num_computed_tokens=0)).num_computed_tokens += count
        return Output(tokens)

    def update_from_output(self, scheduler_output: Output, model_runner_output: object) -> str:
        return "outputs"


class Settings:
    scheduler_cls: object = "ours"
    async_scheduling = True
    chosen: type = Scheduler

    def get_scheduler_cls(self) -> type:
        assert self.scheduler_cls is None, "vLLM would choose us again"
        return self.chosen


def config(**parallel: Any) -> Any:
    shape = {"world_size": 1, "pipeline_parallel_size": 1, "data_parallel_rank_local": None, **parallel}
    return SimpleNamespace(scheduler_config=Settings(), parallel_config=SimpleNamespace(**shape))


@dataclass
class Heard:
    steps: list[StepReport] = field(default_factory=list)
    unable: list[str] = field(default_factory=list)

    def on_steps(self, backend: str, steps: Sequence[StepReport]) -> None:
        self.steps += steps


@pytest.fixture
async def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Heard]:
    heard = Heard()
    path = tmp_path / "run" / "s"
    receiver = StepReceiver(
        path,
        backends=["chat"],
        on_steps=heard.on_steps,
        on_loss=lambda *_: pytest.fail("steps were lost"),
        on_state=lambda *_: None,
        on_unable=lambda _, why: heard.unable.append(why),
    )
    await receiver.start()
    monkeypatch.setenv("JOULEGATE_STEPS_SOCKET", str(path))
    monkeypatch.setenv("JOULEGATE_BACKEND", "chat")
    monkeypatch.setenv("JOULEGATE_DEVICES", "gpu:0,gpu:1,gpu:2,gpu:3")
    yield heard
    await receiver.close()


async def test_each_batch_is_told_with_its_tokens_and_contexts(heard: Heard) -> None:
    scheduler = reporter.scheduler(config(world_size=4), log_stats=True)
    assert isinstance(scheduler, Scheduler)
    assert scheduler.log_stats
    scheduler.plan = [{f"chatcmpl-{ID}-a": 7}, {}, {f"chatcmpl-{ID}-a": 1, f"1_chatcmpl-{OTHER}.1-b": 5, "warm-up": 2}]
    for _ in range(3):
        assert scheduler.update_from_output(scheduler.schedule(), None) == "outputs"
    await until(lambda: len(heard.steps) == 2)
    first, second = heard.steps
    assert (first.requests, first.tokens, first.contexts) == ([ID], [7], [7])
    assert (second.requests, second.tokens, second.contexts) == ([ID, f"{OTHER}.1", ""], [1, 5, 2], [8, 5, 2])
    assert first.devices == ("gpu:0", "gpu:1", "gpu:2", "gpu:3")
    assert first.started <= first.ended <= second.started <= second.ended


async def test_a_batch_that_stays_together_and_changes_is_told_as_it_is(heard: Heard) -> None:
    names = [f"chatcmpl-{number:032x}-a" for number in range(20)]
    scheduler = reporter.scheduler(config())
    one_each = dict.fromkeys(names, 1)
    fewer = dict.fromkeys(names[:7], 1)
    prefill = dict.fromkeys(names, 70_000)
    scheduler.plan = [prefill, *[one_each] * 5, {**one_each, names[3]: 9}, *[one_each] * 3, fewer, *[one_each] * 2]
    expected = []
    for plan in list(scheduler.plan):
        scheduler.update_from_output(scheduler.schedule(), None)
        contexts = [scheduler.requests[name].num_computed_tokens for name in plan]
        expected.append(([name[9:-2] for name in plan], list(plan.values()), contexts))
    await until(lambda: len(heard.steps) == len(expected))
    assert [(step.requests, step.tokens, step.contexts) for step in heard.steps] == expected


async def test_two_batches_in_flight_do_not_overlap(heard: Heard) -> None:
    scheduler = reporter.scheduler(config())
    scheduler.plan = [{"a": 4}, {"a": 1}, {"a": 1}]
    one, two = scheduler.schedule(), scheduler.schedule()
    scheduler.update_from_output(one, None)
    three = scheduler.schedule()
    scheduler.update_from_output(two, None)
    scheduler.update_from_output(three, None)
    await until(lambda: len(heard.steps) == 3)
    a, b, c = heard.steps
    assert b.started == a.ended
    assert c.started == b.ended
    assert [step.contexts for step in heard.steps] == [[4], [5], [6]]


async def test_batches_of_a_pipeline_do_overlap(heard: Heard) -> None:
    scheduler = reporter.scheduler(config(pipeline_parallel_size=2, world_size=2))
    scheduler.plan = [{"a": 4}, {"b": 4}]
    one, two = scheduler.schedule(), scheduler.schedule()
    scheduler.update_from_output(one, None)
    scheduler.update_from_output(two, None)
    await until(lambda: len(heard.steps) == 2)
    assert heard.steps[1].started < heard.steps[0].ended


async def test_each_data_parallel_engine_has_its_own_devices(heard: Heard) -> None:
    scheduler = reporter.scheduler(config(world_size=2, data_parallel_rank_local=1))
    scheduler.plan = [{"a": 1}]
    scheduler.update_from_output(scheduler.schedule(), None)
    await until(lambda: bool(heard.steps))
    assert heard.steps[0].devices == ("gpu:2", "gpu:3")


async def test_a_scheduler_with_other_books_is_left_alone_and_the_proxy_told(heard: Heard) -> None:
    scheduler = reporter.scheduler(config())
    scheduler.plan = [{"a": 1}, {"a": 1}]
    scheduler.requests = {"a": SimpleNamespace(num_computed_tokens=0)}
    output = scheduler.schedule()
    del output.num_scheduled_tokens
    scheduler.joulegate_watch.scheduled(output, {})
    assert scheduler.update_from_output(scheduler.schedule(), None) == "outputs"
    await until(lambda: bool(heard.unable))
    assert "num_scheduled_tokens" in heard.unable[0]


async def test_a_scheduler_without_the_methods_is_used_unwatched(heard: Heard) -> None:
    class Strange:
        def __init__(self, vllm_config: Any) -> None: ...

    strange = config()
    strange.scheduler_config.chosen = Strange
    assert type(reporter.scheduler(strange)) is Strange
    await until(lambda: bool(heard.unable))
    assert "update_from_output" in heard.unable[0]


def test_outside_joulegate_vllm_gets_its_own_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOULEGATE_STEPS_SOCKET", raising=False)
    assert type(reporter.scheduler(config())) is Scheduler
