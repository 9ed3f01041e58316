"""The trace format: the ledger's events as JSON lines, strictly read, and what comes of them.

Times are seconds, energies joules; a number survives the way out and back to the nanosecond and the microjoule (up to
2**51 of them: 26 days of uptime, 2 GJ; one off beyond). Beside the record types of the format's description there is
`loading` (backend, devices, at, loading): a backend begins or ends loading, so that a replay books that energy alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from proxy.energy.attribution import Attribution, DeviceBalance
from proxy.energy.events import (
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Outcome,
    Processes,
    Sample,
    Source,
    Start,
    Step,
)
from proxy.energy.quantities import Watts, joules, microjoules, nanoseconds, seconds
from proxy.errors import JoulegateError

#: What a recorded meter's kind says of its error; a line that differs says so itself.
ACCURACY_BY_METER = {"nvml-counter": 0.05, "nvml-power": 0.05, "rapl": 0.05, "codecarbon": 0.5}


class TraceError(JoulegateError):
    """`TRACE:LINE: what is wrong` (without LINE where it is the file itself)."""

    def __init__(self, trace: str, line: int | None, reason: str) -> None:
        super().__init__(f"{trace}:{line}: {reason}" if line is not None else f"{trace}: {reason}")
        self.trace = trace
        self.line = line
        self.reason = reason


_Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Line(msgspec.Struct, tag_field="type", tag=lambda name: name.removeprefix("_").lower(), omit_defaults=True):
    """One line; unknown fields are ignored, unknown types are not."""


class _Device(_Line):
    device: str
    name: str
    meter: str
    estimated: bool | None = None
    accuracy_ratio: float | None = None


class _Sample(_Line):
    device: str
    at: float
    energy_joules: _NotNegative
    power_watts: _NotNegative | None = None


class _Work(msgspec.Struct):
    request: str
    tokens: _Count
    context: _Count


class _Step(_Line):
    backend: str
    devices: list[str]
    started: float
    ended: float
    work: list[_Work]
    source: Source = "engine"


class _Start(_Line):
    request: str
    at: float
    backend: str


class _Finish(_Line):
    request: str
    at: float
    outcome: Outcome


class _Processes(_Line):
    device: str
    at: float
    foreign_share: _Ratio
    backend_shares: dict[str, _Ratio] = {}


class _Model(_Line):
    backend: str
    device: str
    coefficients: dict[str, float]


class _Loss(_Line):
    backend: str
    reports: _Count


class _Loading(_Line):
    backend: str
    devices: list[str]
    at: float
    loading: bool


_AnyLine = _Device | _Sample | _Step | _Start | _Finish | _Processes | _Model | _Loss | _Loading
_decoder = msgspec.json.Decoder(_AnyLine)
_encoder = msgspec.json.Encoder()


# --- lines to events ---


class Reader:
    """Decodes the lines of one trace, in order; it remembers which devices were declared."""

    def __init__(self) -> None:
        self._devices: set[str] = set()

    def event(self, line: bytes) -> Event:
        """Raises ValueError with what is wrong with the line."""
        try:
            record = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(_in_plain_words(error)) from error
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        try:
            return _EVENTS[type(record)](self, record)
        except OverflowError as error:
            raise ValueError("a number is out of range") from error

    def device(self, line: _Device) -> Device:
        self._devices.add(line.device)
        usual = ACCURACY_BY_METER.get(line.meter)
        return Device(
            line.device,
            line.name,
            line.meter,
            estimated=line.meter == "codecarbon" if line.estimated is None else line.estimated,
            accuracy_ratio=usual if line.accuracy_ratio is None else line.accuracy_ratio,
        )

    def sample(self, line: _Sample) -> Sample:
        self._check_declared(line.device)
        power = None if line.power_watts is None else Watts(line.power_watts)
        return Sample(line.device, nanoseconds(line.at), microjoules(line.energy_joules), power)

    def step(self, line: _Step) -> Step:
        for device in line.devices:
            self._check_declared(device)
        if line.ended < line.started:
            raise ValueError(f"the step ends before it begins (started {line.started}, ended {line.ended})")
        work = line.work
        return Step(
            line.backend,
            tuple(line.devices),
            nanoseconds(line.started),
            nanoseconds(line.ended),
            [each.request for each in work],
            [each.tokens for each in work],
            [each.context for each in work],
            line.source,
        )

    def start(self, line: _Start) -> Start:
        return Start(line.request, nanoseconds(line.at), line.backend)

    def finish(self, line: _Finish) -> Finish:
        return Finish(line.request, nanoseconds(line.at), line.outcome)

    def processes(self, line: _Processes) -> Processes:
        self._check_declared(line.device)
        return Processes(line.device, nanoseconds(line.at), line.foreign_share, line.backend_shares)

    def model(self, line: _Model) -> Model:
        self._check_declared(line.device)
        return Model(line.backend, line.device, line.coefficients)

    def loss(self, line: _Loss) -> Loss:
        return Loss(line.backend, line.reports)

    def loading(self, line: _Loading) -> BackendState:
        for device in line.devices:
            self._check_declared(device)
        return BackendState(line.backend, tuple(line.devices), nanoseconds(line.at), line.loading)

    def _check_declared(self, device: str) -> None:
        if device not in self._devices:
            raise ValueError(f"unknown device {device!r}: no `device` line before this one declares it")


_EVENTS: dict[type, Callable[[Reader, Any], Event]] = {
    _Device: Reader.device,
    _Sample: Reader.sample,
    _Step: Reader.step,
    _Start: Reader.start,
    _Finish: Reader.finish,
    _Processes: Reader.processes,
    _Model: Reader.model,
    _Loss: Reader.loss,
    _Loading: Reader.loading,
}


def _in_plain_words(error: Exception) -> str:
    text = str(error)
    if text.startswith("Invalid value") and text.endswith("`$.type`"):
        return f"unknown type {text.removeprefix('Invalid value ').partition(' - at')[0]}"
    return text.replace(" - at `$.", " at `").replace(" - at `$`", "")


def events_of(lines: Iterable[bytes], trace: str) -> Iterator[tuple[int, Event]]:
    """Each event with the number of its line (from 1); empty lines are skipped. Raises TraceError."""
    reader = Reader()
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            event = reader.event(line)
        except ValueError as error:
            raise TraceError(trace, number, str(error)) from error
        yield number, event


def read_events(path: Path) -> Iterator[tuple[int, Event]]:
    """The events of a trace file as `events_of`; raises TraceError, also for a file that cannot be read."""
    try:
        with path.open("rb") as lines:
            yield from events_of(lines, str(path))
    except OSError as error:
        raise TraceError(str(path), None, f"cannot be read: {error.strerror}") from error


# --- events to lines ---


def _device_line(event: Device) -> _Device:
    estimated, usual = event.meter == "codecarbon", ACCURACY_BY_METER.get(event.meter)
    return _Device(
        event.device,
        event.name,
        event.meter,
        estimated=None if event.estimated == estimated else event.estimated,
        accuracy_ratio=None if event.accuracy_ratio == usual else event.accuracy_ratio,
    )


def _step_line(event: Step) -> _Step:
    columns = zip(event.requests, event.tokens, event.contexts, strict=True)
    work = [_Work(request, int(tokens), int(context)) for request, tokens, context in columns]
    started, ended = seconds(event.started), seconds(event.ended)
    return _Step(event.backend, list(event.devices), started, ended, work, event.source)


_LINES: dict[type, Callable[[Any], _Line]] = {
    Device: _device_line,
    Sample: lambda e: _Sample(e.device, seconds(e.at), joules(e.energy), e.power),
    Step: _step_line,
    Start: lambda e: _Start(e.request, seconds(e.at), e.backend),
    Finish: lambda e: _Finish(e.request, seconds(e.at), e.outcome),
    Processes: lambda e: _Processes(e.device, seconds(e.at), e.foreign_share, dict(e.backend_shares)),
    Model: lambda e: _Model(e.backend, e.device, dict(e.coefficients)),
    Loss: lambda e: _Loss(e.backend, e.reports),
    BackendState: lambda e: _Loading(e.backend, list(e.devices), seconds(e.at), e.loading),
}


def encode(event: Event) -> bytes:
    """The event's line, newline included."""
    return _encoder.encode(_LINES[type(event)](event)) + b"\n"


# --- results to lines ---


def fixed_joules(energy: int) -> str:
    """Microjoules as joules with exactly six decimals."""
    whole, rest = divmod(abs(energy), 1_000_000)
    return f"{'-' if energy < 0 else ''}{whole}.{rest:06d}"


def attribution_line(attribution: Attribution) -> str:
    """A settled request's line of output, without a newline.

    Its joules are null where it worked on a device while nothing measured that: `devices` then has the measured ones.
    """
    shares = attribution.devices
    known = not attribution.unmeasured
    figures = {
        "energy_joules": sum(share.active for share in shares.values()) if known else None,
        "low_joules": sum(share.low for share in shares.values()) if known else None,
        "high_joules": sum(share.high for share in shares.values()) if known else None,
    }
    by_device = ",".join(f"{_text(device)}:{fixed_joules(share.active)}" for device, share in shares.items())
    return (
        f'{{"request":{_text(attribution.request)},"backend":{_text(attribution.backend)},'
        f'"outcome":"{attribution.outcome}",{_figures(figures)},"method":"{attribution.method}",'
        f'"devices":{{{by_device}}}}}'
    )


def balance_line(balance: DeviceBalance) -> str:
    """A device's line of output, without a newline."""
    figures = {
        "counter_joules": balance.counter,
        "requests_joules": balance.requests,
        "idle_joules": balance.idle,
        "foreign_joules": balance.foreign,
        "unattributed_joules": balance.unattributed,
        "residual_joules": balance.residual,
    }
    return f'{{"device":{_text(balance.device)},{_figures(figures)}}}'


def _figures(figures: Mapping[str, int | None]) -> str:
    return ",".join(
        f'"{name}":{"null" if energy is None else fixed_joules(energy)}' for name, energy in figures.items()
    )


def _text(value: str) -> str:
    return _encoder.encode(value).decode()
