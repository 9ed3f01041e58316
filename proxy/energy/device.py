"""One device's books: its windows, the steps that ran on it, and who got what of each settled window."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proxy.energy.attribution import DeviceBalance, DeviceShare
from proxy.energy.cost_model import IDLE_GUESS, CostModels
from proxy.energy.events import Device, Sample
from proxy.energy.idle import IdlePower, LastHour
from proxy.energy.intervals import Doubts, interval
from proxy.energy.lag import LagEstimate
from proxy.energy.pending import Floats, PendingSteps, Steps
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.energy.registry import PROXY_INDEX, UNATTRIBUTED, Registry
from proxy.energy.rounding import largest_remainder
from proxy.energy.spans import LoadingSpans, Use, UseSpans, covered
from proxy.energy.tallies import Tallies
from proxy.energy.timeline import Timeline, Window

#: A device of which others used less than this counts as free of foreign processes when idle power is calibrated.
_NO_FOREIGN = 0.01
#: The proxy's own part of a busy device's power, where CPU time does not tell.
_PROXY_PART = 0.05


@dataclass(frozen=True, slots=True)
class _Scene:
    """All that matters to how one window is divided."""

    window: Window
    steps: Steps
    overlap: Floats  # nanoseconds of each step in the window
    busy: int
    loading: int
    use: Use


class DeviceBook:
    """Settles windows one after the other; `settled_until` is where it has got to."""

    def __init__(self, device: Device, registry: Registry, backend_names: Sequence[str]) -> None:
        self.device = device
        self.pending_steps = PendingSteps()
        self.uses, self.loading = UseSpans(), LoadingSpans()
        self.tallies = Tallies(registry.capacity)
        self.windows: deque[Window] = deque()
        self.settled_until: Nanoseconds | None = None
        self.late_steps = 0
        self._registry = registry
        self._timeline, self._lag = Timeline(), LagEstimate()
        self._models, self._idle, self._hour = CostModels(), IdlePower(), LastHour()
        self._requests = self._idle_energy = self._foreign = self._unattributed = self._pending = 0
        self._last_work = -(1 << 62)
        self._backend_names = backend_names  # grows as backends become known

    # --- what comes in ---

    def sample(self, sample: Sample) -> None:
        first = not self._timeline.started
        window = self._timeline.add(sample)
        if first:
            self.settled_until = sample.at
        if window is not None:
            self.windows.append(window)
            self._pending += window.energy

    def look(self) -> None:
        """Take in the steps that arrived since the last look: predict what they cost."""
        new = self.pending_steps.take_new()
        self.tallies.grow(self._registry.capacity)
        if not len(new):
            return
        self._models.learn_durations(new.where(~self._is_timed(new)))
        new.predicted[:] = predicted = self._price(new)
        self.pending_steps.join(new)
        self._lag.ran(new, predicted)
        settled = self._settled_fraction(new)[new.owner]
        np.add.at(self.tallies.awaited, new.slot, predicted * (1 - settled))
        np.add.at(self.tallies.lost, new.slot, predicted * settled)
        np.minimum.at(self.tallies.first_start, new.slot, new.started[new.owner])
        np.maximum.at(self.tallies.last_end, new.slot, new.ended[new.owner])
        self.late_steps += int((settled > 0).sum())

    def _price(self, steps: Steps) -> Floats:
        proxy = steps.backend == PROXY_INDEX
        by_time = np.where(self._is_timed(steps), np.where(proxy, _PROXY_PART, 1.0), 0.0)
        return self._models.price(steps, by_time[steps.owner], self._idle.watts)

    def _is_timed(self, steps: Steps) -> npt.NDArray[np.bool_]:
        """Steps that are priced by time: nobody knows what work they did, or they are the proxy's own."""
        timed: npt.NDArray[np.bool_] = (steps.per_step(steps.tokens) <= 0) | (steps.backend == PROXY_INDEX)
        return timed

    def _settled_fraction(self, steps: Steps) -> Floats:
        if self.settled_until is None:
            return np.zeros(len(steps))
        return np.clip((self.settled_until - steps.started) / (steps.ended - steps.started), 0.0, 1.0)

    # --- settling ---

    def settle(self) -> None:
        """Divide the oldest window, for good."""
        window = self.windows.popleft()
        self.look()
        scene = self._scene(window)
        self._learn(scene)
        if window.energy:
            self._divide(scene)
        if len(scene.steps):
            self._last_work = max(self._last_work, int(scene.steps.ended.max()))
        self._consume(scene)

    def _scene(self, window: Window) -> _Scene:
        start, end = window.start, window.end
        everything = self.pending_steps.steps
        steps = everything.where(everything.overlap(start, end) > 0)
        busy = covered(steps.started, steps.ended, start, end)
        loading = 0
        if self.loading:
            starts, ends = self.loading.columns()
            both = covered(
                np.concatenate((steps.started, starts)), np.concatenate((steps.ended, ends)), start, end
            )  # fmt: skip
            loading = both - busy
        return _Scene(
            window, steps, steps.overlap(start, end).astype(np.float64), busy, loading, self.uses.during(start, end)
        )

    def _learn(self, scene: _Scene) -> None:
        window = scene.window
        if window.hole or scene.loading or scene.use.foreign > _NO_FOREIGN:
            return
        if self._models.knows_costs:
            self._lag.compare(window.ticked_start, window.ticked_end, window.energy, self._idle_watts())
            self._timeline.lag = self._lag.nanoseconds
        if scene.busy:
            self._learn_costs(scene)
        elif (
            self._last_work < window.start - window.start_slack
            and not self._registry.presence(window.start, window.end).any()
        ):
            self._idle.learn(window.energy, window.length)

    def _split_error(self, scene: _Scene) -> float:
        if not len(scene.steps):
            return 0.0
        return self._models.split_error(np.unique(scene.steps.backend).tolist())

    def _learn_costs(self, scene: _Scene) -> None:
        window, steps = scene.window, scene.steps
        timed = self._is_timed(steps)
        if (timed & (steps.backend != PROXY_INDEX)).any() or timed.all():
            return
        watts = self._idle_watts()
        energy = window.energy - watts * (window.length - scene.busy) / 1e3
        if energy > 0:
            part = scene.overlap / (steps.ended - steps.started)
            self._models.learn_energy(steps.where(~timed), part[~timed], energy, scene.busy, window.length)

    def _idle_watts(self) -> float:
        return self._idle.watts if self._idle.watts is not None else IDLE_GUESS * self._models.busy_watts(None)

    def _divide(self, scene: _Scene) -> None:
        window, steps = scene.window, scene.steps
        fraction = scene.overlap / (steps.ended - steps.started)
        entries = self._price(steps) * fraction[steps.owner]
        entries = self._by_processes(scene, entries)
        used = self._registry._used
        by_slot = np.bincount(steps.slot, weights=entries, minlength=used).astype(np.float64)
        idle, foreign, loading, ours = self._accounts(scene, float(by_slot.sum()))
        scale = ours / max(float(by_slot.sum()), 1e-300)
        weights = np.concatenate(([idle, foreign], by_slot * scale))
        weights[2 + UNATTRIBUTED] += loading
        parts = largest_remainder(window.energy, weights)
        self._book(scene, parts, by_slot)

    def _accounts(self, scene: _Scene, predicted: float) -> tuple[float, float, float, float]:
        """The window's energy as idle, foreign, loading and our steps', in proportion to what is predicted of each."""
        energy, gap = scene.window.energy, scene.window.length - scene.busy - scene.loading
        mean = energy / scene.window.length
        loading = mean * scene.loading
        idle_watts = self._idle.watts
        if predicted + loading <= 0:
            idle = (
                energy
                if idle_watts is None and not scene.use.foreign
                else min(energy, (idle_watts or 0.0) * gap / 1000)
            )
            foreign = scene.use.foreign * (energy - idle)
            return energy - foreign, foreign, 0.0, 0.0
        idle = self._idle_watts() * gap / 1000
        if len(scene.steps) == 0:
            idle, loading = min(idle, mean * gap), energy - min(idle, mean * gap)
        scale = energy / (idle + loading + predicted)
        active = energy - idle * scale
        foreign = scene.use.foreign * active
        rest = max(active - foreign, 0.0) / (predicted + loading)
        return idle * scale, foreign, loading * rest, predicted * rest

    def _by_processes(self, scene: _Scene, entries: Floats) -> Floats:
        """Where CPU time tells each backend's part, it prices the split between backends; predictions do within one."""
        shares = scene.use.backends
        if not shares or not len(scene.steps):
            return entries
        owner_backend = scene.steps.backend[scene.steps.owner]
        predicted = np.bincount(owner_backend, weights=entries, minlength=len(self._backend_names))
        wanted = np.array([shares.get(name, 0.0) for name in self._backend_names]) * (predicted > 0)
        if wanted.sum() <= 1e-9:
            return entries
        factor = np.divide(wanted, predicted, out=np.zeros_like(predicted), where=predicted > 0)
        priced: Floats = entries * (factor * (predicted.sum() / wanted.sum()))[owner_backend]
        return priced

    def _book(self, scene: _Scene, parts: np.ndarray[tuple[int], np.dtype[np.int64]], by_slot: Floats) -> None:
        window, tallies = scene.window, self.tallies
        idle, foreign, unattributed = int(parts[0]), int(parts[1]), int(parts[2])
        slots = parts[3:]
        requests = int(slots.sum())
        self._idle_energy += idle
        self._foreign += foreign
        self._unattributed += unattributed
        self._requests += requests
        self._pending -= window.energy
        used = len(slots) + 1
        tallies.active[1:used] += slots
        others = slots * (1 - slots / window.energy)
        tallies.split[1:used] += self._split_error(scene) * others
        tallies.noise[1:used] += (self._models.window_error * slots) ** 2
        tallies.meanwhile[:used] += window.energy * self._registry.presence(window.start, window.end)
        self._hour.add(window.end, idle, requests, scene.busy)
        if self._idle.watts and len(scene.steps):
            each = (
                self._idle.watts
                / 1000
                * scene.overlap
                * (scene.busy / scene.overlap.sum())
                / np.maximum(scene.steps.count, 1)
            )
            np.add.at(tallies.idle_part, scene.steps.slot, each[scene.steps.owner])

    def _consume(self, scene: _Scene) -> None:
        """The window's work is settled: it is no longer awaited."""
        self.settled_until = scene.window.end
        steps = scene.steps
        if len(steps):
            done = (scene.overlap / (steps.ended - steps.started))[steps.owner]
            price = steps.predicted * done
            np.add.at(self.tallies.awaited, steps.slot, -price)
            if scene.window.hole:
                np.add.at(self.tallies.lost, steps.slot, price)
        self.pending_steps.drop_until(scene.window.end)
        self.uses.drop_until(scene.window.end)
        self.loading.drop_until(scene.window.end)

    # --- what goes out ---

    def share(self, slot: int, *, settled: bool, lost_ratio: float = 0.0) -> DeviceShare:
        """A request's share: what settled windows gave it and, while provisional, what is predicted for the rest."""
        tallies = self.tallies
        tail = 0.0 if settled else max(float(tallies.awaited[slot]), 0.0)
        active = int(tallies.active[slot]) + round(tail)
        low, high = interval(self._doubts(slot, tail, lost_ratio))
        ratio = self._hour.idle_ratio()
        marginal = max(active - round(float(tallies.idle_part[slot])), 0)
        return DeviceShare(
            active=Microjoules(active),
            low=Microjoules(min(low, active)),
            high=Microjoules(max(high, active)),
            marginal=Microjoules(marginal),
            full=None if ratio is None else Microjoules(round(active * (1 + ratio))),
            meanwhile=Microjoules(max(round(float(tallies.meanwhile[slot]) + tail), active)),
        )

    def _doubts(self, slot: int, tail: float, lost_ratio: float) -> Doubts:
        tallies = self.tallies
        return Doubts(
            active=float(tallies.active[slot]), tail=tail, noise=float(tallies.noise[slot]),
            split=float(tallies.split[slot]), lost=float(tallies.lost[slot]), lost_ratio=lost_ratio,
            work_length=int(tallies.last_end[slot]) - int(tallies.first_start[slot]) if tallies.touched(slot) else 1,
            instant_error=self._timeline.instant_error,
        )  # fmt: skip

    def recall(self, backend: int, coefficients: Mapping[str, float]) -> None:
        """Begin a backend's cost model with a prior, or with what was learnt before."""
        self._models.recall(backend, coefficients)
        if coefficients.get("idle_watts", 0.0) > 0:
            self._idle.expect(coefficients["idle_watts"])

    def coefficients(self, backend: int) -> dict[str, float]:
        """What was learnt of a backend here; empty for nothing."""
        learnt = self._models.coefficients(backend)
        return {**learnt, "idle_watts": self._idle.watts} if learnt and self._idle.watts else learnt

    def abandon(self, slot: int) -> None:
        """The request settles though work of it may be pending: nobody gets that but `unattributed`."""
        self.pending_steps.disown(slot, UNATTRIBUTED)
        self.tallies.clear(slot)

    def balance(self) -> DeviceBalance:
        timeline, watts = self._timeline, self._idle.watts
        return DeviceBalance(
            device=self.device.device, name=self.device.name, meter=self.device.meter,
            estimated=self.device.estimated, accuracy_ratio=self.device.accuracy_ratio,
            counter=timeline.counter, requests=Microjoules(self._requests), idle=Microjoules(self._idle_energy),
            foreign=Microjoules(self._foreign), unattributed=Microjoules(self._unattributed),
            pending=Microjoules(self._pending), power=timeline.power,
            idle_power=None if watts is None else Watts(watts), last_sample_at=timeline.last_sample_at,
            fit_error_ratio={self._backend_names[index]: error for index, error in self._models.errors().items()},
        )  # fmt: skip
