"""Step reports from inside vLLM: its own scheduler, watched. Given to vLLM as `--scheduler-cls`.

vLLM schedules a batch (`schedule()`), executes it, and takes its output in (`update_from_output()`). With two batches
in flight, as generation has them, a batch is scheduled while its predecessor runs: its own step begins when it had
been scheduled *and* the predecessor was done. With pipeline parallelism batches run beside each other.

vLLM says that this interface is not public. So nothing here may harm it: where the interface is not as expected, the
engine runs with its own scheduler, unwatched, and one line of its log says so.
"""

import copy
import ctypes
import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from backends.steps import SUPERVISED_VARIABLE, StepReporter, attempt_id, encoded
from backends.vllm.versions import TESTED, untested

logger = logging.getLogger("vllm.joulegate")

_PR_SET_PDEATHSIG = 1
_IN_FLIGHT = 64  # far more than vLLM ever has; what is never taken in must not pile up


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The scheduler vLLM would have made, reporting its steps; called by vLLM in the place of a class."""
    _die_with_parent()
    base = _own_choice(vllm_config)
    reporter = StepReporter.from_environment()
    if not reporter.active:
        return base(vllm_config, *args, **kwargs)
    missing = [name for name in ("schedule", "update_from_output") if not callable(getattr(base, name, None))]
    if missing:
        _complain(reporter, f"its scheduler has no {', '.join(missing)}")
        return base(vllm_config, *args, **kwargs)
    made = _watched(base)(vllm_config, *args, **kwargs)
    devices, overlapping = _place(vllm_config.parallel_config, reporter.devices)
    made.joulegate_watch = StepWatch(reporter, devices, overlapping=overlapping)
    logger.info("joulegate: reporting the steps of %s on %s", base.__name__, ", ".join(made.joulegate_watch.devices))
    return made


def _own_choice(vllm_config: Any) -> type:
    """The scheduler's class that vLLM chooses when none is given (asynchronous or not, or for a diffusion model)."""
    settings = copy.copy(vllm_config.scheduler_config)
    settings.scheduler_cls = None
    if getattr(vllm_config, "diffusion_config", None) is not None:
        kind = "DiffusionAsyncScheduler" if settings.async_scheduling else "DiffusionScheduler"
        settings.scheduler_cls = f"vllm.v1.core.sched.diffusion_scheduler.{kind}"
    return settings.get_scheduler_cls()  # type: ignore[no-any-return]  # vLLM's, and it is a class


def _watched(base: Any) -> Any:
    """A subclass of `base` that tells a `StepWatch` what goes through it."""

    class Watched(base):  # type: ignore[misc]  # vLLM is not installed where this is checked
        joulegate_watch: "StepWatch | None" = None

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            if self.joulegate_watch is not None:
                self.joulegate_watch.scheduled(output, self.requests)
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self.joulegate_watch is not None:
                self.joulegate_watch.executed(scheduler_output)
            return super().update_from_output(scheduler_output, *args, **kwargs)

    Watched.__name__ = Watched.__qualname__ = f"Watched{base.__name__}"
    return Watched


class StepWatch:
    """Makes a step report of each batch: what was scheduled, from when to when it ran (`overlapping`: side by side)."""

    def __init__(self, reporter: StepReporter, devices: tuple[str, ...], *, overlapping: bool) -> None:
        self.devices = devices
        self._reporter = reporter
        self._overlapping = overlapping
        self._in_flight: dict[int, tuple[int, _Batch, list[int], list[int]]] = {}
        self._last_end = 0
        self._batch = _Batch([], {})
        self._broken = False

    def scheduled(self, output: Any, requests: Mapping[str, Any]) -> None:
        """A batch has been put together: vLLM has already counted its tokens as computed, so contexts are its ends."""
        if self._broken:
            return
        try:
            tokens: Mapping[str, int] = output.num_scheduled_tokens
            if tokens:
                at = time.monotonic_ns()
                names = list(tokens)
                if names != self._batch.names:  # most batches are the one before once more, which is found out cheaply
                    self._batch = _Batch(names, requests)
                contexts = [row.num_computed_tokens for row in self._batch.rows]
                self._in_flight[id(output)] = (at, self._batch, list(tokens.values()), contexts)
                if len(self._in_flight) > _IN_FLIGHT:
                    del self._in_flight[next(iter(self._in_flight))]
        except Exception as error:
            self._give_up(error)

    def executed(self, output: Any) -> None:
        """A batch's output has come back: its step is over."""
        work = self._in_flight.pop(id(output), None)
        if work is None or self._broken:
            return
        ended = time.monotonic_ns()
        scheduled, batch, tokens, contexts = work
        started = scheduled if self._overlapping else max(scheduled, self._last_end)
        self._last_end = ended
        self._reporter.report(started, ended, batch.ids, tokens, contexts, devices=self.devices)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        _complain(self._reporter, f"{type(error).__name__}: {error}")


class _Batch:
    """The sequences of a batch for as long as they stay together: our ids of them are found and encoded once."""

    def __init__(self, names: list[str], requests: Mapping[str, Any]) -> None:
        self.names = names
        self.ids = encoded([attempt_id(name) for name in names])
        self.rows = [requests[name] for name in names]


def _place(parallel: Any, devices: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """The devices of this engine (data parallel engines have some each), and whether its batches run side by side."""
    rank = getattr(parallel, "data_parallel_rank_local", None) or 0
    size = int(parallel.world_size)
    mine = devices[rank * size : (rank + 1) * size] if len(devices) > size else devices
    return mine or devices, int(parallel.pipeline_parallel_size) > 1


def _complain(reporter: StepReporter, why: str) -> None:
    logger.warning("joulegate: no step reports from %s (%s); tested with %s", untested(), why, TESTED)
    reporter.unable(why)


def _die_with_parent() -> None:
    """The engine is a child of vLLM's server: it must not hold the GPU when that is killed outright."""
    if SUPERVISED_VARIABLE not in os.environ:  # somebody else's server, started in ways we do not know
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
