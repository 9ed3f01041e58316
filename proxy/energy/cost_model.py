"""The cost models of all backends on one device: fitted together, for they share its windows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from proxy.energy.fit import OnlineFit, Structure
from proxy.energy.intervals import Tail, split_error, tail_of
from proxy.energy.pending import Alone, Floats, Steps
from proxy.energy.registry import PROXY_INDEX
from proxy.energy.step_model import DURATION, ENERGY, PriceOfOne, StepModel

#: Where nothing is known yet, a device idles at this part of its busy power (an assumption; the interval says so).
IDLE_GUESS = 0.25
#: The proxy's own part of a busy device's power, where CPU time does not tell.
PROXY_PART = 0.05
#: The most that a device is thought to draw while nobody has seen it busy (assumed: no accelerator of today, nor the
#: processors of one host, draw more).
PLAUSIBLE_WATTS = 1_500.0
#: How many times its usual busy power a device may draw for a moment.
_MUCH = 2.0
_SIZE = len(ENERGY)
_HORIZON = 600.0
_SIGMA = 0.04
#: The power that flips at the edges of a window may be on either side of them for about so long (seconds).
_EDGE_SECONDS = 0.01
_POWER_SECONDS = 20.0
_SOLVE_EVERY = 10
_ERROR_SPEED, _SPAN_ERROR_SPEED = 0.01, 0.05
_SPAN_NANOSECONDS = 1_000_000_000
#: Steps that are priced by time alone may each have done anything.
_TIMED_ERROR = 0.5


@dataclass(slots=True)
class _Span:
    """Windows of about a second, over which what is off on one side of a tick and on the other cancels."""

    off: float = 0.0
    joules: float = 0.0
    busy: int = 0
    backends: set[int] = field(default_factory=set)


_EAGER_WINDOWS = 100
_EVIDENCE = 20
_SELDOM = 4
_NOTICEABLE = 0.05


class CostModels:
    """Prices steps in microjoules, and learns from windows. Backends are known by their index."""

    def __init__(self) -> None:
        self._models: dict[int, StepModel] = {}
        self._order: list[int] = []  # the place of each backend's coefficients in the joint fit
        self._fit: OnlineFit | None = None
        self._busy_watts: float | None = None
        self._recent_watts: float | None = None
        self._windows = 0
        self._rows: list[tuple[Floats, float, float]] = []  # windows not yet taken into the fit
        self._batches = 0
        self._span = _Span()
        self.window_error = 0.3
        self.version = 0
        """Prices of one version are the same."""
        self._prices: dict[int, PriceOfOne | None] = {}
        self._tail_errors: dict[int, float | None] = {}
        self._prices_version = 0

    def recall(self, backend: int, coefficients: Mapping[str, float]) -> None:
        """Begin with these coefficients: a prior, or what was learnt before. What runs already knows better."""
        if backend not in self._order:
            self._models[backend] = StepModel(coefficients)
            self.version += 1

    def busy_watts(self, idle_watts: float | None) -> float:
        """The power of the device while steps run, as far as it is known."""
        if self._busy_watts is not None:
            return self._busy_watts
        return idle_watts / IDLE_GUESS if idle_watts else 1.0

    def guessed_idle_watts(self) -> float:
        return IDLE_GUESS * self.busy_watts(None)

    @property
    def knows_costs(self) -> bool:
        """Whether predictions have a scale and some evidence behind them."""
        return self._windows >= _EVIDENCE

    # --- prices ---

    def price(self, steps: Steps, timed: Floats, idle_watts: float | None) -> Floats:
        """Predicted microjoules of each entry; a step's entries sum to the step.

        `timed` is by entry, and 0 for those whose work is known. The others are priced by time alone: at this part of
        the device's busy power.
        """
        prices = np.zeros(len(steps.slot))
        for backend, some in _by_backend(steps):
            model = self._model(backend)
            joules = model.price(some, self._energy(backend, model, some, idle_watts))
            if model.seconds is None:  # its guess has a shape but no scale
                joules *= _as_long(some, joules, self.busy_watts(idle_watts))
            prices[_entries(steps, backend, some)] = joules * 1e6
        by_time = timed > 0
        if by_time.any():
            watts = self.busy_watts(idle_watts)
            owner = steps.owner[by_time]
            length = (steps.ended - steps.started)[owner]
            prices[by_time] = timed[by_time] * watts * length / 1e3 / steps.count[owner]
        return prices

    def tail(self, backend: int, energy: float, length: int) -> Tail:
        """How sure a prediction of so many microjoules is, for steps of a backend of so many nanoseconds in all."""
        error = self._tail_error(backend)
        return self._anything(energy, length) if error is None else tail_of(energy, error)

    def tail_alone(self, step: Alone, timed: float, idle_watts: float | None) -> Tail:
        """The prediction for one step of one participant, cheaply.

        `timed` is 0 if its work is known: then it is priced as the model says; else, or where that says nothing yet, by
        time: at this part of the device's busy power.
        """
        backend, started, ended, repeat, _, tokens, context = step
        length = ended - started
        price = None if timed > 0 else self._price_of_one(backend)
        if price is not None:
            return self.tail(backend, repeat * price.joules(tokens, context) * 1e6, length)
        part = timed or 1.0
        energy = part * self.busy_watts(idle_watts) * length / 1e3
        if self._busy_watts is None:
            return self._anything(energy, round(length * min(part / PROXY_PART, 1.0)))
        return tail_of(energy, _TIMED_ERROR)

    def _anything(self, energy: float, length: int) -> Tail:
        """Nobody knows yet what this device draws when it is busy: anything that is possible."""
        return Tail(energy, energy, max(PLAUSIBLE_WATTS * length / 1e3 - energy, energy))

    def most(self, length: int) -> float:
        """The most that steps nobody has told of may use in so many nanoseconds."""
        watts = PLAUSIBLE_WATTS if self._busy_watts is None else _MUCH * self._busy_watts
        return watts * length / 1e3

    def _tail_error(self, backend: int) -> float | None:
        """Relative error of what is predicted for a backend's steps; None where nothing is known of it."""
        self._keep_prices()
        if backend not in self._tail_errors:
            model = self._models.get(backend)
            error = None if model is None or model.energy is None else model.tail_error(self.window_error)
            self._tail_errors[backend] = error
        return self._tail_errors[backend]

    def _keep_prices(self) -> None:
        """What is remembered of prices holds for one version of them."""
        if self._prices_version != self.version:
            self._prices, self._tail_errors, self._prices_version = {}, {}, self.version

    def _price_of_one(self, backend: int) -> PriceOfOne | None:
        """None for a backend of which nothing is known yet."""
        self._keep_prices()
        if backend not in self._prices:
            self._prices[backend] = self._find_price_of_one(backend)
        return self._prices[backend]

    def _find_price_of_one(self, backend: int) -> PriceOfOne | None:
        model = self._models.get(backend)
        if model is None or model.energy is None or model.seconds is None:
            return None
        fitted = self._fit is not None and backend in self._order
        return model.price_of_one(self._fitted(backend) if fitted else model.energy)

    def _fitted(self, backend: int) -> Floats:
        assert self._fit is not None
        place = self._order.index(backend) * _SIZE
        return self._fit.coefficients[place : place + _SIZE]

    def _model(self, backend: int) -> StepModel:
        return self._models.setdefault(backend, StepModel())

    def _energy(self, backend: int, model: StepModel, steps: Steps, idle_watts: float | None) -> Floats:
        """A backend's energy coefficients: fitted, else its prior, else a guess."""
        if self._fit is not None and backend in self._order:
            return self._fitted(backend)
        if model.energy is None:
            guess: Floats = model.basis() @ model.guess_powers(self.busy_watts(idle_watts), steps.sums.mean(axis=0))
            return guess
        return model.energy

    # --- learning ---

    def learn_durations(self, steps: Steps, lengths: Floats) -> None:
        """From these steps and how many nanoseconds each took; once there were many, from one such batch in four."""
        self._batches += 1
        if self._windows > _EAGER_WINDOWS and self._batches % _SELDOM:
            return
        for backend, some in _by_backend(steps):
            chosen = slice(None) if some is steps else _chosen(steps, backend)
            if self._model(backend).learn_durations(some, lengths[chosen] / 1e9):
                self.version += 1

    def learn_energy(self, steps: Steps, fraction: Floats, energy: float, busy: int, length: int) -> None:
        """A window of `length` ns in which these parts of steps ran for `busy` ns in all, on `energy` µJ (no idle)."""
        works = {backend: (some, fraction[_chosen(steps, backend)]) for backend, some in _by_backend(steps)}
        for backend, (work, _) in works.items():
            if backend not in self._order:
                self._join(backend, work)
        fit = self._fit
        assert fit is not None
        row = np.zeros(len(self._order) * _SIZE)
        for backend, (work, part) in works.items():
            place = self._order.index(backend) * _SIZE
            row[place : place + _SIZE] = part @ self._models[backend].energy_features(work)
        joules = energy / 1e6
        edges = 2 if busy < length else 0
        sigma = math.hypot(_SIGMA * joules, edges * _EDGE_SECONDS * joules / busy * 1e9)
        self._note_errors(joules - float(row @ fit.coefficients), joules, busy, works)
        self._rows.append((row, joules, sigma))
        self._windows += 1
        if self._windows < _EAGER_WINDOWS or len(self._rows) >= _SOLVE_EVERY:
            self._solve()

    def _solve(self) -> None:
        """Take what was learnt into the coefficients: all prices change."""
        for model in self._models.values():
            if model.seconds is not None:
                model.seconds.solve()
        self._add_rows()
        assert self._fit is not None
        self._fit.lean_on(self._structure())
        self._fit.solve()
        self.version += 1

    def _add_rows(self) -> None:
        if self._rows and self._fit is not None:
            rows, joules, sigmas = zip(*self._rows, strict=True)
            self._fit.add(np.array(rows), np.array(joules), np.array(sigmas))
            self._rows.clear()

    def learn_power(self, energy: float, busy: int) -> None:
        """Steps ran for `busy` ns of a window and used `energy` µJ. Prices change when that has moved noticeably."""
        watts = energy / busy * 1e3
        old = watts if self._recent_watts is None else self._recent_watts
        self._recent_watts = old + (watts - old) * min(1.0, busy / 1e9 / _POWER_SECONDS)
        if self._busy_watts is None or abs(self._recent_watts / self._busy_watts - 1) > _NOTICEABLE:
            self._busy_watts = self._recent_watts
            self.version += 1

    def _join(self, backend: int, steps: Steps) -> None:
        """A backend's first window on this device: its energies join the fit."""
        model = self._models[backend]
        model.begin_energy(self.busy_watts(None), steps.sums.mean(axis=0))
        assert model.energy is not None
        self._add_rows()
        self._order.append(backend)
        if self._fit is None:
            self._fit = OnlineFit(model.energy, np.ones(_SIZE), _HORIZON)
        else:
            self._fit.widen(model.energy, np.ones(_SIZE))
        self.version += 1

    def _structure(self) -> Structure:
        """All backends' structures beside each other."""
        parts = [self._models[backend].structure() for backend in self._order]
        basis = np.zeros((_SIZE * len(parts), sum(len(part.start) for part in parts)))
        column = 0
        for row, part in enumerate(parts):
            width = len(part.start)
            basis[row * _SIZE : (row + 1) * _SIZE, column : column + width] = part.basis
            column += width
        starts, doubts, looses = zip(*((part.start, part.doubt, part.loose) for part in parts), strict=True)
        return Structure(basis, np.concatenate(starts), np.concatenate(doubts), np.concatenate(looses))

    def _note_errors(self, off: float, joules: float, busy: int, backends: Iterable[int]) -> None:
        error = min(abs(off) / joules, 1.0)
        self.window_error += (error - self.window_error) * max(_ERROR_SPEED, 1 / (self._windows + 1))
        span = self._span
        span.off, span.joules, span.busy = span.off + off, span.joules + joules, span.busy + busy
        span.backends.update(backends)
        for backend in backends:
            self._models[backend].windows += 1
        if span.busy >= _SPAN_NANOSECONDS:
            self._note_span(min(abs(span.off) / span.joules, 1.0))

    def _note_span(self, error: float) -> None:
        for backend in self._span.backends:
            model = self._models[backend]
            model.spans += 1
            model.error += (error - model.error) * max(_SPAN_ERROR_SPEED, 1 / model.spans)
        self._span = _Span()

    def errors(self) -> dict[int, float]:
        """By backend, the recent error of the energy predicted for spans of about a second, relative to it."""
        return {backend: model.error for backend, model in self._models.items() if model.windows}

    def split_error(self, steps: Steps) -> float:
        """How wrongly a window of these steps may be divided between them."""
        models = [self._model(backend) for backend, _ in _by_backend(steps) if backend != PROXY_INDEX]
        return max((split_error(min(model.error, 0.2), model.windows) for model in models), default=_TIMED_ERROR)

    def coefficients(self, backend: int) -> dict[str, float]:
        """What has been learnt of a backend, to be recalled after a restart; empty for nothing."""
        model = self._models.get(backend)
        if model is None or self._fit is None or backend not in self._order:
            return {}
        energy = self._fitted(backend)
        learnt = dict(zip(DURATION, model.duration.tolist(), strict=True))
        learnt |= dict(zip(ENERGY, energy.tolist(), strict=True))
        return {**learnt, "windows": model.windows}


def _as_long(steps: Steps, joules: Floats, watts: float) -> Floats:
    """By entry, the factor that makes each step's joules those of so many watts for as long as it took."""
    factor: Floats = (watts * (steps.ended - steps.started) / 1e9 / steps.per_step(joules))[steps.owner]
    return factor


def _chosen(steps: Steps, backend: int) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    chosen: np.ndarray[tuple[int], np.dtype[np.bool_]] = steps.backend == backend
    return chosen


def _by_backend(steps: Steps) -> list[tuple[int, Steps]]:
    if not len(steps):
        return []
    if (steps.backend == steps.backend[0]).all():
        return [(int(steps.backend[0]), steps)]
    return [(int(backend), steps.where(_chosen(steps, int(backend)))) for backend in np.unique(steps.backend)]


def _entries(steps: Steps, backend: int, some: Steps) -> "slice | np.ndarray[tuple[int], np.dtype[np.bool_]]":
    return slice(None) if some is steps else _chosen(steps, backend)[steps.owner]
