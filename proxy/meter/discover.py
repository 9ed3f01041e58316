"""Which meters this machine has, and why not the others: what `joulegate serve` uses and `joulegate doctor` shows."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxy.meter.base import Meter, MeterError, MeterProblem
from proxy.meter.estimate import EstimateMeter
from proxy.meter.rapl import POWERCAP, RaplMeter
from proxy.meter.replay import replay_meters

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeterSettings:
    """Which meters may be used. `replay`: play this trace's devices and use no hardware at all."""

    nvml: bool = True
    rapl: bool = True
    rapl_root: Path = POWERCAP
    estimate: bool = True
    replay: Path | None = None


@dataclass(frozen=True, slots=True)
class Discovery:
    """At most one meter per device. A problem with one kind of meter may have been solved by another's measuring."""

    meters: Sequence[Meter] = field(default_factory=list)
    problems: Sequence[MeterProblem] = field(default_factory=list)


def discover(settings: MeterSettings, environ: Mapping[str, str] = os.environ) -> Discovery:
    """Open the best meter of each device. Takes about half a second with GPUs.

    Raises MeterError only for a trace to replay that cannot be played: everything else is a problem in the answer.
    """
    if settings.replay is not None:
        return Discovery(replay_meters(settings.replay))
    meters: list[Meter] = []
    problems: list[MeterProblem] = []
    host_is_covered = False
    if settings.nvml:
        from proxy.meter.nvml_discovery import discover_gpus  # noqa: PLC0415 - pynvml is not needed without GPUs

        gpus = discover_gpus(environ)
        meters += gpus.meters
        problems += gpus.problems
        host_is_covered = gpus.covers_host
    else:
        problems.append(MeterProblem("nvml", "switched off", "switch it on in the configuration"))
    host = _host_meter(settings, problems, host_is_covered=host_is_covered)
    return Discovery(meters if host is None else [*meters, host], problems)


def _host_meter(settings: MeterSettings, problems: list[MeterProblem], *, host_is_covered: bool) -> Meter | None:
    """RAPL, or else the estimate, said aloud."""
    measured = _tried("rapl", settings.rapl, lambda: RaplMeter(settings.rapl_root), problems)
    if measured is not None:
        return measured
    if host_is_covered:
        log.info("host: not estimated, since the GPU's module counter includes the CPU")
        return None
    estimate = _tried("codecarbon", settings.estimate, EstimateMeter.of_this_machine, problems)
    if estimate is not None:
        reason = next((problem for problem in problems if problem.meter == "rapl"), None)
        log.warning(
            "host: falling back to CodeCarbon's estimate of its energy: %s%s",
            reason.why if reason else "it is not measured",
            f"; cure: {reason.cure}" if reason and reason.cure else "",
        )
    return estimate


def _tried(kind: str, allowed: bool, attempt: Callable[[], Meter], problems: list[MeterProblem]) -> Meter | None:
    if not allowed:
        problems.append(MeterProblem(kind, "switched off", "switch it on in the configuration"))
        return None
    try:
        return attempt()
    except MeterError as error:
        problems.append(MeterProblem(kind, error.why, error.cure))
        return None
