"""What the tests have done in a process of its own, whose dynamic linker finds the stand-in."""

import logging
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from proxy.energy.events import Device, Event, Processes, Sample
from proxy.energy.quantities import Nanoseconds
from proxy.meter import nvml, nvml_api
from proxy.meter import sampler as sampler_module
from proxy.meter.base import Meter, MeterError, Reading
from proxy.meter.discover import MeterSettings, discover
from proxy.meter.nvml_discovery import discover_gpus
from proxy.meter.sampler import MeterStatus, Sampler


@dataclass(frozen=True)
class FoundMeter:
    device: str
    name: str
    kind: str
    uuid: str
    period: int | None
    reading: Reading | str


@dataclass(frozen=True)
class Found:
    meters: list[FoundMeter]
    problems: dict[str, str]
    covers_host: bool
    log: str


class Log(logging.Handler):
    """The log's lines as one text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Log":
        logging.getLogger("proxy").addHandler(self)
        logging.getLogger("proxy").setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("proxy").removeHandler(self)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def _reading(meter: Meter) -> Reading | str:
    try:
        return meter.read()
    except MeterError as error:
        return str(error)


def find(environ: Mapping[str, str] | None = None) -> Found:
    """Discover the GPUs, read each once, close them."""
    with Log() as log:
        found = discover_gpus(environ or {})
        meters = [
            FoundMeter(m.device, m.name, m.kind, getattr(m, "uuid", ""), getattr(m, "period", None), _reading(m))
            for m in found.meters
        ]
        for meter in found.meters:
            meter.close()
    problems = {problem.meter: f"{problem.why}; cure: {problem.cure}" for problem in found.problems}
    return Found(meters, problems, found.covers_host, log.text)


def find_everything(environ: Mapping[str, str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The kinds of all meters of this machine by `discover`, and the problems."""
    found = discover(MeterSettings(), environ or {})
    for meter in found.meters:
        meter.close()
    return [meter.kind for meter in found.meters], {problem.meter: problem.why for problem in found.problems}


@dataclass
class Course:
    """What a sampler emitted and said over some time."""

    devices: list[Device] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    processes: list[Processes] = field(default_factory=list)
    statuses: list[list[MeterStatus]] = field(default_factory=list)
    log: str = ""
    cpu_seconds: float = 0.0

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Device):
                self.devices.append(event)
            elif isinstance(event, Sample):
                self.samples.append(event)
            elif isinstance(event, Processes):
                self.processes.append(event)

    def of(self, device: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.device == device]


def watch(
    directory: str, hz: float = 50, pids: Mapping[str, Collection[int]] | None = None, *, impatient: bool = True
) -> Course:
    """Sample all GPUs from when the file `started` appears in `directory` until the file `done` does.

    `impatient`: what takes seconds in earnest (standing still, sums to compare, retries) takes tenths.
    """
    if impatient:
        be_impatient()
    course = Course()
    with Log() as log:
        sampler = Sampler(discover_gpus({}).meters, course.take, hz=hz, our_pids=lambda: pids or {})
        cpu = time.process_time()
        sampler.start()
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{directory}/done") and time.monotonic() < deadline:
            time.sleep(0.01)
            if course.samples:
                course.statuses.append(sampler.status())
                pathlib.Path(directory, "started").touch()
        sampler.stop()
        course.cpu_seconds = time.process_time() - cpu
    course.log = log.text
    return course


def be_impatient() -> None:
    nvml.STANDSTILL = Nanoseconds(300_000_000)
    nvml.Comparison.shortest = Nanoseconds(500_000_000)
    nvml.LONGEST_INTEGRATED_PAUSE = Nanoseconds(300_000_000)
    nvml_api.Session.renewal_seconds = 0.1
    nvml_api.Session.renewal_seconds_while_others_work = 0.3
    sampler_module.LONGEST_RETRY_PAUSE = 0.1
    sampler_module.PROCESSES_PAUSE = 0.1
