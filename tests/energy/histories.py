"""Made-up histories of events, as messy as real ones, for the laws to be tried on."""

import itertools

from hypothesis import strategies as st

from proxy.energy.events import BackendState, Device, Event, Finish, Loss, Processes, Sample, Source, Start, Step
from proxy.energy.quantities import Microjoules, Nanoseconds

MILLISECOND = 1_000_000
SECOND = 1_000 * MILLISECOND
GPU = Device("gpu:0", "H100", "nvml-counter")
HOST = Device("host", "CPU", "codecarbon", estimated=True)


def at(seconds: float) -> Nanoseconds:
    return Nanoseconds(round(seconds * SECOND))


def sample(device: str, when: float, joules: float) -> Sample:
    return Sample(device, at(when), Microjoules(round(joules * 1e6)))


def step(
    began: float,
    ended: float,
    work: dict[str, tuple[int, int]] | dict[str, int],
    *,
    backend: str = "chat",
    devices: tuple[str, ...] = ("gpu:0",),
    source: Source = "engine",
) -> Step:
    """A step whose work is tokens, or (tokens, context), by request."""
    pairs = [amount if isinstance(amount, tuple) else (amount, amount) for amount in work.values()]
    return Step(
        backend, devices, at(began), at(ended), list(work), [t for t, _ in pairs], [k for _, k in pairs], source
    )  # fmt: skip


_ids = st.sampled_from(["a", "b", "c", "d", "e", ""])
_times = st.integers(0, 80_000).map(lambda milliseconds: Nanoseconds(milliseconds * MILLISECOND))
_devices = st.sampled_from(["gpu:0", "host"])
_backends = st.sampled_from(["chat", "painter", "proxy"])


@st.composite
def _samples(draw: st.DrawFn) -> list[Event]:
    """One device's samples: ticks missed, counters reset, polls that see no change."""
    device = draw(_devices)
    rises = draw(
        st.lists(st.tuples(st.integers(0, 3_000), st.sampled_from([0, 0, 1, 7, 999, 10**6, 10**8, -1])), max_size=40)
    )
    when, energy, samples = draw(st.integers(0, 5_000)), draw(st.integers(0, 10**9)), list[Event]()
    for gap, rise in rises:
        when += gap
        energy = energy + rise if rise >= 0 else draw(st.integers(0, 10**6))
        samples.append(Sample(device, Nanoseconds(when * MILLISECOND), Microjoules(energy)))
    return samples


@st.composite
def _steps(draw: st.DrawFn) -> Event:
    began, length = draw(_times), draw(st.integers(0, 4_000))
    work = draw(st.lists(st.tuples(_ids, st.integers(0, 4096), st.integers(0, 9000)), max_size=5))
    return Step(
        draw(_backends), draw(st.sampled_from([("gpu:0",), ("host",), ("gpu:0", "host")])), began,
        Nanoseconds(began + length * MILLISECOND), [w[0] for w in work], [w[1] for w in work], [w[2] for w in work],
        draw(st.sampled_from(["engine", "relay"])),
    )  # fmt: skip


_others = st.one_of(
    _steps(),
    _steps(),
    st.builds(Start, _ids.filter(bool), _times, _backends),
    st.builds(Finish, _ids, _times, st.sampled_from(["completed", "cancelled", "failed"])),
    st.builds(Processes, _devices, _times, st.floats(0, 1), st.dictionaries(_backends, st.floats(0, 1))),
    st.builds(Loss, _backends, st.integers(0, 3)),
    st.builds(BackendState, _backends, st.just(("gpu:0",)), _times, st.booleans()),
)


def _when(event: Event) -> int:
    return event.ended if isinstance(event, Step) else getattr(event, "at", 0)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Events of every kind, mostly in the order of time, with some moved and some doubled."""
    sampled = list(itertools.chain.from_iterable(draw(st.lists(_samples(), max_size=2))))
    events = sorted([*sampled, *draw(st.lists(_others, max_size=60))], key=_when)
    for _ in range(draw(st.integers(0, 4))):
        if events:
            events.insert(draw(st.integers(0, len(events) - 1)), events[draw(st.integers(0, len(events) - 1))])
    return [GPU, HOST, *events]
