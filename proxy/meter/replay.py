"""Meters that play a recorded trace's samples in real time, or a function of time: features, and the tests' fakes."""

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

from proxy.energy.events import Device, Sample
from proxy.energy.quantities import Microjoules, Watts
from proxy.meter.base import Meter, MeterError, Reading
from proxy.trace import TraceError, read_events

log = logging.getLogger(__name__)


class ReplayMeter:
    """Plays a device's recorded samples, from the first reading on: each reading is the sample of that moment.

    It is not looped: after the last sample the energy stands, power is unknown, and the log says so once; energy that
    nobody measured is not invented. It is an estimate if and only if the recorded meter was.
    """

    kind = "replay"

    def __init__(
        self, recorded: Device, samples: Sequence[Sample], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.device = recorded.device
        self.name = recorded.name
        self.estimated = recorded.estimated
        self.accuracy_ratio = recorded.accuracy_ratio
        self._samples = samples
        self._times = [sample.at - samples[0].at for sample in samples]
        self._clock = clock
        self._began: int | None = None
        self._ended = False

    def read(self) -> Reading:
        now = self._clock()
        if self._began is None:
            self._began = now
        elapsed = now - self._began
        sample = self._samples[bisect_right(self._times, elapsed) - 1]
        if elapsed <= self._times[-1]:
            return Reading(sample.energy, sample.power)
        if not self._ended:
            self._ended = True
            log.warning("%s: the replayed trace has ended: its meter stands still from now on", self.device)
        return Reading(sample.energy, None)

    def close(self) -> None:
        pass


def replay_meters(trace: Path) -> list[Meter]:
    """A meter for each device that the trace has samples of. Raises MeterError for a trace that cannot be played."""
    devices: dict[str, Device] = {}
    samples: dict[str, list[Sample]] = {}
    try:
        for _, event in read_events(trace):
            if isinstance(event, Device):
                devices[event.device] = event
            elif isinstance(event, Sample) and _is_later(event, samples.setdefault(event.device, [])):
                samples[event.device].append(event)
    except TraceError as error:
        raise MeterError(str(error), cure="replay a trace that `joulegate serve --record` wrote") from error
    if not samples:
        raise MeterError(f"{trace} holds no samples", cure="record one with `joulegate serve --record`")
    return [ReplayMeter(devices[device], of_device) for device, of_device in samples.items()]


def _is_later(sample: Sample, before: Sequence[Sample]) -> bool:
    return not before or sample.at > before[-1].at


class ScriptedMeter:
    """A meter whose cumulative joules are `energy(seconds since its first reading)`, and its power `power(seconds)`.

    `failure`, while set, is raised instead. `kind`, `estimated` and `accuracy_ratio` can be set to play another meter.
    """

    def __init__(
        self,
        energy: Callable[[float], float],
        power: Callable[[float], float | None] = lambda _: None,
        *,
        device: str = "gpu:0",
        kind: str = "replay",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.device = device
        self.name = f"scripted {device}"
        self.kind = kind
        self.estimated = kind == "codecarbon"
        self.accuracy_ratio: float | None = None
        self.failure: Exception | None = None
        self.closed = False
        self._energy = energy
        self._power = power
        self._clock = clock
        self._began: int | None = None

    @classmethod
    def constant(cls, watts: float, *, device: str = "gpu:0", kind: str = "replay") -> "ScriptedMeter":
        """A device that always draws so much."""
        return cls(lambda at: watts * at, lambda _: watts, device=device, kind=kind)

    def read(self) -> Reading:
        if self.failure is not None:
            raise self.failure
        now = self._clock()
        if self._began is None:
            self._began = now
        at = (now - self._began) / 1e9
        watts = self._power(at)
        return Reading(Microjoules(round(self._energy(at) * 1_000_000)), None if watts is None else Watts(watts))

    def close(self) -> None:
        self.closed = True
