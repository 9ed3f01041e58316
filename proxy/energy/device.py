"""One device's books: its windows, the steps that ran on it, and who got what of each settled window."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from proxy.energy.attribution import DeviceBalance, DeviceShare
from proxy.energy.backend import Backend
from proxy.energy.cost_model import PROXY_PART, CostModels
from proxy.energy.division import Division, Scene, divide, lengths_alone, priced_by_processes, scene_of
from proxy.energy.events import Device, Sample
from proxy.energy.idle import IdlePower, LastHour
from proxy.energy.intervals import NO_TAIL, Doubts, Tail, interval
from proxy.energy.lag import LagEstimate
from proxy.energy.pending import TOKENS, Alone, Batch, Bools, Floats, Ints, PendingSteps, Steps
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.energy.registry import NEVER, PROXY_INDEX, UNATTRIBUTED, Registry, Request
from proxy.energy.spans import LoadingSpans, UseSpans
from proxy.energy.tallies import Tallies
from proxy.energy.timeline import Timeline, Window

#: A device of which others used less than this counts as free of foreign processes when something is learnt.
_NO_FOREIGN = 0.01
_LARGE_BATCH = 64
#: Of a step that is not told yet a request already under way has hardly more than so many equal parts.
_BIG_SHARE = 4.0
_MOST = float(1 << 62)
#: Makes a share of bare integers: thousands of them a second are worth a detour around the units' names.
_share: Callable[[int, int, int, int, int | None, int], DeviceShare] = cast(Any, DeviceShare)
#: Where backends run side by side on cores of their own; on an accelerator they take turns.
HOST = "host"


class DeviceBook:
    """Settles windows one after the other; `settled_until` is where it has got to, None before the first sample."""

    def __init__(self, device: Device, registry: Registry, backend_names: Sequence[str]) -> None:
        self.device = device
        self.pending_steps = PendingSteps()
        self.uses, self.loading = UseSpans(), LoadingSpans()
        self.tallies = Tallies(registry.capacity)
        registry.follow(self.tallies)
        self.windows: deque[Window] = deque()
        self.settled_until: Nanoseconds | None = None
        self.late_steps = 0
        self.waits_for: Backend | None = None
        """Whose steps the oldest window waits for, as far as is known."""
        self._registry = registry
        self._backend_names = backend_names  # grows as backends become known
        self._timeline, self._lag = Timeline(), LagEstimate()
        self._models, self._idle, self._hour = CostModels(), IdlePower(), LastHour()
        self._prices_version = (0, False)
        self._requests = self._idle_energy = self._foreign = self._unattributed = self._pending = 0
        self._last_work = NEVER

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
        if not len(new):
            return
        new.predicted[:] = self._price(new)
        self.pending_steps.join(new)
        self._await(new)
        self.tallies.last_price[new.slot], self.tallies.last_tokens[new.slot] = new.predicted, new.tokens
        np.minimum.at(self.tallies.first_start, new.slot, new.started[new.owner])
        np.maximum.at(self.tallies.last_end, new.slot, new.ended[new.owner])

    def _await(self, new: Steps) -> None:
        """Work that is yet to settle; and what comes too late for that."""
        np.add.at(self.tallies.awaited, new.slot, new.predicted)
        late = self._settled_part(new)
        if late.any():
            lost = new.predicted * late[new.owner]
            np.add.at(self.tallies.awaited, new.slot, -lost)
            np.add.at(self.tallies.lost, new.slot, lost)
            self.late_steps += int((late > 0).sum())

    def _settled_part(self, steps: Steps) -> Floats:
        if self.settled_until is None:
            return np.zeros(len(steps))
        part: Floats = np.clip((self.settled_until - steps.started) / (steps.lengths), 0.0, 1.0)
        return part

    def _price(self, steps: Steps) -> Floats:
        by_time = np.where(steps.backend == PROXY_INDEX, PROXY_PART, 1.0) * _is_timed(steps)
        return self._models.price(steps, by_time[steps.owner], self._idle.watts)

    # --- settling ---

    def settle(self) -> None:
        """Divide the oldest window, for good."""
        window = self.windows.popleft()
        self.look()
        scene = self._scene(window)
        self._learn(scene)
        if self._reprice():
            scene = self._scene(window)
        if window.energy:
            self._divide(scene)
        self._consume(scene)

    def _scene(self, window: Window) -> Scene:
        use = self.uses.during(window.start, window.end)
        return scene_of(window, self.pending_steps.steps, self.loading, use)

    def _divide(self, scene: Scene) -> None:
        prices = scene.steps.predicted * scene.part[scene.steps.owner]
        prices = priced_by_processes(scene, prices, self._backend_names)
        division = divide(scene, prices, self._idle.watts, self._models.guessed_idle_watts(), self._registry.used)
        self._book(scene, division)
        self._describe(scene, division)

    def _book(self, scene: Scene, division: Division) -> None:
        slots = division.slots
        unattributed = int(slots[UNATTRIBUTED])
        requests = int(slots.sum()) - unattributed
        self._requests += requests
        self._idle_energy += division.idle
        self._foreign += division.foreign
        self._unattributed += unattributed
        self._pending -= scene.window.energy
        self.tallies.active[1 : len(slots)] += slots[1:]
        self._hour.add(scene.window.end, division.idle, requests, scene.busy)

    def _describe(self, scene: Scene, division: Division) -> None:
        """What goes with the shares: how sure they are, their idle part, and what the whole device used meanwhile."""
        window, steps, tallies = scene.window, scene.steps, self.tallies
        used = len(division.slots)
        tallies.meanwhile[:used] += window.energy * self._registry.presence(window.start, window.end)
        if not len(steps):
            return
        split = self._models.split_error(steps)
        others = 1 - division.slots / window.energy  # what is all one's own leaves no doubt
        tallies.split[:used] += split * division.slots * others
        tallies.noise[:used] += (self._models.window_error * division.slots) ** 2 * others
        if self._idle.watts:
            lengths = scene.part * (steps.lengths)
            each = self._idle.watts / 1e3 * scene.busy * (lengths / lengths.sum()) / steps.count
            np.add.at(tallies.idle_part, steps.slot, each[steps.owner])

    def _consume(self, scene: Scene) -> None:
        """The window's work is settled: it is no longer awaited."""
        self.settled_until = scene.window.end
        steps = scene.steps
        if len(steps):
            self._last_work = max(self._last_work, int(steps.ended.max()))
            done = steps.predicted * scene.part[steps.owner]
            np.add.at(self.tallies.awaited, steps.slot, -done)
            if scene.window.hole:
                np.add.at(self.tallies.lost, steps.slot, done)
        self.pending_steps.drop_until(scene.window.end)
        self.uses.drop_until(scene.window.end)
        self.loading.drop_until(scene.window.end)

    def _reprice(self) -> bool:
        """If something was learnt, predict anew what is awaited."""
        version = (self._models.version, self._idle.watts is not None)
        if self._prices_version == version:
            return False
        self._prices_version = version
        steps, tallies = self.pending_steps.steps, self.tallies
        tallies.awaited[:] = 0.0
        if len(steps):
            steps.predicted[:] = self._price(steps)
            np.add.at(tallies.awaited, steps.slot, steps.predicted * (1 - self._settled_part(steps))[steps.owner])
        return True

    # --- learning ---

    def _learn(self, scene: Scene) -> None:
        """Learning happens here only, window by window: what is asked meanwhile must not change what is learnt."""
        window = scene.window
        begun = scene.steps.started >= window.start
        worked = begun & ~_is_timed(scene.steps)
        self._models.learn_durations(scene.steps.where(worked), self._lengths(scene.steps)[worked])
        self._lag.ran(scene.steps.where(begun))
        if window.hole or scene.loading or scene.use.foreign > _NO_FOREIGN:
            return
        if self._models.knows_costs:
            self._lag.compare(window.ticked_start, window.ticked_end, window.energy, self._idle_watts())
            self._timeline.lag = self._lag.nanoseconds
        if scene.busy:
            self._learn_costs(scene)
        elif self._is_idle(window):
            self._idle.learn(window.energy, window.length)

    def _lengths(self, steps: Steps) -> Floats:
        """Nanoseconds of each step, without what other backends took of them where backends take turns."""
        return steps.lengths if self.device.device == HOST else lengths_alone(steps)

    def _is_idle(self, window: Window) -> bool:
        """Nothing ran, nor shortly before (the tick's instant is uncertain), and no request was open."""
        if self._last_work >= window.start - window.start_slack:
            return False
        return not self._registry.presence(window.start, window.end).any()

    def _learn_costs(self, scene: Scene) -> None:
        window, steps = scene.window, scene.steps
        timed = _is_timed(steps)
        energy = window.energy - self._idle_watts() * scene.gap / 1e3
        if energy <= 0:
            return
        self._models.learn_power(energy, scene.busy)
        if not timed.all() and not (timed & (steps.backend != PROXY_INDEX)).any():
            self._models.learn_energy(steps.where(~timed), scene.part[~timed], energy, scene.busy, window.length)

    def _idle_watts(self) -> float:
        return self._idle.watts if self._idle.watts is not None else self._models.guessed_idle_watts()

    def recall(self, backend: int, coefficients: Mapping[str, float]) -> None:
        """Begin a backend's cost model with a prior, or with what was learnt before."""
        self._models.recall(backend, coefficients)
        if coefficients.get("idle_watts", 0.0) > 0:
            self._idle.expect(coefficients["idle_watts"])

    def coefficients(self, backend: int) -> dict[str, float]:
        """What was learnt of a backend here; empty for nothing."""
        learnt = self._models.coefficients(backend)
        return {**learnt, "idle_watts": self._idle.watts} if learnt and self._idle.watts else learnt

    # --- what goes out ---

    def unsettled(self, start: int, end: int) -> int:
        """Nanoseconds of the span that no settled window covers."""
        return max(end - max(start, self.settled_until or NEVER), 0)

    def provisional(self, request: Request, lost_ratio: float, silence: int, open_requests: int) -> DeviceShare | None:
        """What settled windows gave it, and what is predicted for the rest; None if it had no step here.

        For `silence` nanoseconds its engine may have worked for it, among so many, and not have told yet.
        """
        unseen = self._glance(request)
        if silence:
            untold = Tail(0.0, 0.0, self._models.most(silence) * min(_BIG_SHARE / open_requests, 1.0))
            unseen = untold if unseen is None and self.tallies.touched(request.slot) else unseen and unseen.plus(untold)
        if not self.tallies.touched(request.slot):
            return None if unseen is None else self._predicted_only(unseen)
        awaited = max(float(self.tallies.awaited[request.slot]), 0.0)
        length = int(self.tallies.last_end[request.slot] - self.tallies.first_start[request.slot])
        tail = self._models.tail(request.backend_index, awaited, length)
        return self._share_with_tail(request.slot, lost_ratio, tail if unseen is None else tail.plus(unseen))

    def shares(self, slots: Ints, lost_ratios: Floats) -> list[DeviceShare]:
        """What settled windows gave these requests, for good."""
        # What was predicted and no window ever measured is as good as lost.
        self.tallies.lost[slots] += np.maximum(self.tallies.awaited[slots], 0.0)
        return self._settled_shares(slots, lost_ratios)

    def nothing(self, silence: int, open_requests: int) -> DeviceShare:
        """The share of a request that had no step here, where steps are reported: 0, but for what is not told yet.

        Of that it gets an equal part, for the time being: a figure of 0 would be a false one.
        """
        most = self._models.most(silence)
        each = self._models.busy_watts(self._idle.watts) * silence / 1e3 / open_requests
        return self._predicted_only(Tail(each, each, max(most - each, 0.0)))

    def _predicted_only(self, tail: Tail) -> DeviceShare:
        """The share of a request of which no window has seen anything yet."""
        active, low, ratio = round(tail.energy), tail.energy - tail.below, self._hour.idle_ratio()
        high = math.ceil(tail.energy + tail.above)
        full = None if ratio is None else round(active * (1 + ratio))
        return _share(active, math.floor(low) if low > 0 else 0, high, active, full, active)

    def _share_with_tail(self, slot: int, lost_ratio: float, tail: Tail) -> DeviceShare:
        """Windows have measured a part of it."""
        row, ratio = self.tallies.row(slot), self._hour.idle_ratio()
        active = row.active + round(tail.energy)
        edges = self._timeline.instant_error / max(row.last_end - row.first_start, self._timeline.instant_error, 1.0)
        low, high = interval(
            Doubts(float(row.active), max(row.noise, 0.0), row.split, row.lost, lost_ratio, edges), tail
        )
        full = None if ratio is None else round(active * (1 + ratio))
        meanwhile = max(round(row.meanwhile + tail.energy), active)
        marginal = max(active - round(row.idle_part), 0)
        return _share(
            active, min(max(math.floor(low), 0), active), max(math.ceil(high), active), marginal, full, meanwhile
        )

    def _settled_shares(self, slots: Ints, lost_ratios: Floats) -> list[DeviceShare]:
        rows, ratio = self.tallies.rows(slots), self._hour.idle_ratio()
        active = rows.active
        edges = self._timeline.instant_error / np.maximum(
            rows.last_end - rows.first_start, max(self._timeline.instant_error, 1.0)
        )
        noise = np.maximum(rows.noise, 0.0)
        low, high = interval(
            Doubts(active.astype(np.float64), noise, rows.split, rows.lost, lost_ratios, edges), NO_TAIL
        )
        full = [None] * len(slots) if ratio is None else _whole(active * (1 + ratio)).tolist()
        columns = (
            active,
            np.minimum(_whole(np.floor(low)), active),
            np.maximum(_whole(np.ceil(high)), active),
            np.maximum(active - _whole(rows.idle_part), 0),
            np.maximum(_whole(rows.meanwhile), active),
        )
        exact, lows, highs, marginal, meanwhile = (column.tolist() for column in columns)
        return list(map(_share, exact, lows, highs, marginal, full, meanwhile))

    def _glance(self, request: Request) -> Tail | None:
        """What is predicted for a request's steps that nobody has looked at yet; None for no such steps.

        A look at those prices a whole batch, which is dear for one figure; so it is spared where all are the request's
        alone, or a continuation of what it did in its last step, in a batch so large that it hardly changes.
        """
        pending = self.pending_steps
        tail: Tail | None = None
        settled_until = self.settled_until or NEVER
        for step in pending.alone_of(request.slot):
            if step[1] < settled_until:
                self.look()
                return None
            predicted = self._tail_alone(step)
            tail = predicted if tail is None else tail.plus(predicted)
        for batch in pending.batches:
            if batch.ended <= request.started:
                continue
            places = np.flatnonzero(batch.slots == request.slot)
            if len(places):
                known = self._tail_in_batch(batch, places, request.slot) if batch.started >= settled_until else None
                if known is None:
                    self.look()
                    return None
                tail = known if tail is None else tail.plus(known)
        return tail

    def _tail_alone(self, step: Alone) -> Tail:
        timed = PROXY_PART if step[0] == PROXY_INDEX else float(step[5] <= 0)
        return self._models.tail_alone(step, timed, self._idle.watts)

    def _tail_in_batch(self, batch: Batch, places: Ints, slot: int) -> Tail | None:
        """A request's part of a batch, where that can be told cheaply."""
        if batch.backend == PROXY_INDEX:
            part = PROXY_PART * len(places) / len(batch.slots)
            alone = (PROXY_INDEX, batch.started, batch.ended, 1, slot, 0, 0)
            return self._models.tail_alone(alone, part, self._idle.watts)
        price = float(self.tallies.last_price[slot])
        same = (
            price > 0 and len(batch.slots) >= _LARGE_BATCH and (batch.tokens[places] == self.tallies.last_tokens[slot])
        )
        if not np.all(same):
            return None
        return self._models.tail(batch.backend, price * len(places), batch.ended - batch.started)

    def touched(self, slot: int) -> bool:
        """Whether the request had a step on this device."""
        return self.tallies.touched(slot)

    def measured(self, slots: Ints) -> Bools:
        """Which of these requests' work falls at least partly in the time in which the meter was read."""
        if self.settled_until is None:
            return np.zeros(len(slots), dtype=bool)
        first, last = self.tallies.first_start[slots], self.tallies.last_end[slots]
        seen: Bools = (last > self._timeline.began_at) & (first < self.settled_until)
        return seen

    def abandon(self, gone: Bools, slots: Ints) -> None:
        """These requests have settled: what work of them may still be pending is nobody's. `gone` is by slot."""
        self.pending_steps.disown(gone, UNATTRIBUTED)
        self.tallies.clear(slots)

    def balance(self) -> DeviceBalance:
        timeline, watts, names = self._timeline, self._idle.watts, self._backend_names
        return DeviceBalance(
            device=self.device.device, name=self.device.name, meter=self.device.meter,
            estimated=self.device.estimated, accuracy_ratio=self.device.accuracy_ratio,
            counter=timeline.counter, requests=Microjoules(self._requests), idle=Microjoules(self._idle_energy),
            foreign=Microjoules(self._foreign), unattributed=Microjoules(self._unattributed),
            pending=Microjoules(self._pending), power=timeline.power,
            idle_power=None if watts is None else Watts(watts), last_sample_at=timeline.last_sample_at,
            fit_error_ratio={names[index]: error for index, error in self._models.errors().items()},
        )  # fmt: skip


def _is_timed(steps: Steps) -> Bools:
    """Steps that are priced by time: nobody knows what work they did, or they are the proxy's own."""
    timed: Bools = (steps.sums[:, TOKENS] <= 0) | (steps.backend == PROXY_INDEX)
    return timed


def _whole(energy: "npt.NDArray[np.floating[Any]]") -> Ints:
    """Rounded to whole microjoules, within what integers hold."""
    whole: Ints = np.clip(np.rint(energy), 0, _MOST).astype(np.int64)
    return whole
