"""How others divide a device's energy among requests: each split a small function, named after who does so.

All of them see the same polled counter as the ledger, and better step times than any of them has in the field: the
comparison is of the *rules*. Those that need tokens count computed ones (a cached prefix costs nobody anything).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bench.attribution.emission import Arrival, request_id
from bench.attribution.gpu import Floats, Ints
from bench.attribution.simulation import World
from proxy.energy.events import Finish, Sample, Start

#: On servers with one GPU, as its billing has been described; see docs/accuracy.md.
NEURALWATT_CAP = 0.25
AITRA_WINDOW_SECONDS = 30.0
KEPLER_WINDOW_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Observation:
    """A run as a peer could have seen it, column-wise: requests, steps, and entries (one sequence in one step)."""

    requests: list[str]
    request_started: Floats
    request_ended: Floats
    step_started: Floats
    step_ended: Floats
    entry_step: Ints
    entry_request: Ints
    tokens: Floats
    output_tokens: Floats
    counter_seconds: Floats
    counter_joules: Floats

    def energy_at(self, seconds: Floats) -> Floats:
        """The counter, interpolated between its changes."""
        return np.asarray(np.interp(seconds, self.counter_seconds, self.counter_joules))

    def per_request(self, entries: Floats) -> Floats:
        return np.asarray(np.bincount(self.entry_request, weights=entries, minlength=len(self.requests)))

    @property
    def entry_seconds(self) -> Floats:
        return np.asarray((self.step_ended - self.step_started)[self.entry_step])


Split = Callable[[Observation], Floats]


def observe(world: World, arrivals: list[Arrival]) -> Observation:
    started = {e.event.request: e.event.at / 1e9 for e in arrivals if isinstance(e.event, Start)}
    ended = {e.event.request: e.event.at / 1e9 for e in arrivals if isinstance(e.event, Finish)}
    number = {name: index for index, name in enumerate(started)}
    steps = world.executions
    names = [request_id(step.backend, r) for step in steps for r in step.requests.tolist()]
    seconds, joules = _changes([e.event for e in arrivals if isinstance(e.event, Sample)])
    return Observation(
        list(started),
        np.array(list(started.values())),
        np.array([ended[name] for name in started]),
        np.array([step.started for step in steps]),
        np.array([step.ended for step in steps]),
        np.repeat(np.arange(len(steps)), [len(step.requests) for step in steps]),
        np.fromiter(map(number.__getitem__, names), dtype=np.int64, count=len(names)),
        np.concatenate([step.batch.tokens for step in steps]).astype(float),
        np.concatenate([step.batch.sampled for step in steps]).astype(float),
        seconds,
        joules,
    )


def _changes(samples: list[Sample]) -> tuple[Floats, Floats]:
    joules = np.array([sample.energy / 1e6 for sample in samples])
    changed = np.append(True, np.diff(joules) > 0)
    return np.array([sample.at / 1e9 for sample in samples])[changed], joules[changed]


def windowed(seen: Observation, edges: Floats, weights: Floats) -> Floats:
    """Joules per request: the energy between each two `edges` in proportion to the entries' weights in it.

    A step that spans several windows weighs in each by its overlap. A window without any weight is nobody's.
    """
    rises = np.diff(seen.energy_at(edges))
    step, window, part = _overlaps(seen, edges)
    step_weight = np.bincount(seen.entry_step, weights=weights, minlength=len(seen.step_started))
    total = np.bincount(window, weights=step_weight[step] * part, minlength=len(rises))
    return priced(seen, edges, weights, np.divide(rises, total, out=np.zeros_like(rises), where=total > 0))


def priced(seen: Observation, edges: Floats, weights: Floats, price: Floats) -> Floats:
    """Joules per request: entries' weights times the price of the windows in which their steps lie."""
    step, window, part = _overlaps(seen, edges)
    per_weight = np.bincount(step, weights=part * price[window], minlength=len(seen.step_started))
    return seen.per_request(weights * per_weight[seen.entry_step])


def _overlaps(seen: Observation, edges: Floats) -> tuple[Ints, Ints, Floats]:
    """All pairs (step, window) that overlap, and the part of the step that lies in the window."""
    last_window = len(edges) - 2
    first = np.clip(np.searchsorted(edges, seen.step_started, side="right") - 1, 0, last_window)
    last = np.clip(np.searchsorted(edges, seen.step_ended, side="left") - 1, first, last_window)
    count = last - first + 1
    step = np.repeat(np.arange(len(first)), count)
    window = np.arange(len(step)) - np.repeat(np.cumsum(count) - count, count) + first[step]
    inside = np.minimum(seen.step_ended[step], edges[window + 1]) - np.maximum(seen.step_started[step], edges[window])
    return step, window, np.maximum(inside, 0.0) / (seen.step_ended - seen.step_started)[step]


def zeus(seen: Observation) -> Floats:
    """A window per request, and the whole device's energy in it: right when alone, else counted several times."""
    return seen.energy_at(seen.request_ended) - seen.energy_at(seen.request_started)


def aitra_windows(seen: Observation) -> Floats:
    """Joules per token of each 30 s window, times the request's tokens in it."""
    return windowed(seen, _grid(seen, AITRA_WINDOW_SECONDS), seen.tokens)


def aitra_run(seen: Observation) -> Floats:
    """Joules per token of the whole run, times the request's tokens."""
    return _whole_run(seen, seen.tokens)


def neuralwatt(seen: Observation) -> Floats:
    """The device's energy during the request times its part of the tokens meanwhile, at most the cap."""
    seconds, computed = _tokens_by_time(seen)
    meanwhile = np.interp(seen.request_ended, seconds, computed) - np.interp(seen.request_started, seconds, computed)
    ratio = seen.per_request(seen.tokens) / np.maximum(meanwhile, 1.0)
    return zeus(seen) * np.minimum(ratio, NEURALWATT_CAP)


def ml_energy(seen: Observation) -> Floats:
    """Joules per output token of the whole run, times the request's output tokens."""
    return _whole_run(seen, seen.output_tokens)


def kepler(seen: Observation) -> Floats:
    """Per 5 s, the energy of the busy part by utilisation: how long each request was being worked on."""
    edges = _grid(seen, KEPLER_WINDOW_SECONDS)
    step, window, part = _overlaps(seen, edges)
    busy = np.bincount(window, weights=part * (seen.step_ended - seen.step_started)[step], minlength=len(edges) - 1)
    ratio = np.minimum(busy / np.diff(edges), 1.0)
    active = np.append(0.0, np.cumsum(np.diff(seen.energy_at(edges)) * ratio))
    return windowed(replace(seen, counter_seconds=edges, counter_joules=active), edges, seen.entry_seconds)


def time_share(seen: Observation) -> Floats:
    """Per counter window, each step's time in equal parts to its participants."""
    batch = np.bincount(seen.entry_step)
    return windowed(seen, seen.counter_seconds, seen.entry_seconds / batch[seen.entry_step])


def window_tokens(seen: Observation) -> Floats:
    """Per counter window, by tokens computed."""
    return windowed(seen, seen.counter_seconds, seen.tokens)


def window_output_tokens(seen: Observation) -> Floats:
    """Per counter window, by output tokens."""
    return windowed(seen, seen.counter_seconds, seen.output_tokens)


#: Label by split, in the order of the table.
PEERS: dict[str, Split] = {
    "Zeus (whole window to each)": zeus,
    "Aitra (tokens, whole run)": aitra_run,
    "Aitra (tokens, 30 s windows)": aitra_windows,
    "Neuralwatt (token ratio, capped)": neuralwatt,
    "ML.ENERGY (output tokens, whole run)": ml_energy,
    "Kepler (utilisation, 5 s)": kepler,
    "time share (per step, equal)": time_share,
    "tokens per counter window": window_tokens,
    "output tokens per counter window": window_output_tokens,
}


def _whole_run(seen: Observation, weights: Floats) -> Floats:
    """From the first request's start to the last one's end, the energy by weight."""
    begin, end = seen.request_started.min(), seen.request_ended.max()
    energy = float(np.diff(seen.energy_at(np.array([begin, end])))[0])
    mine = seen.per_request(weights)
    return np.asarray(energy * mine / mine.sum())


def _grid(seen: Observation, seconds: float) -> Floats:
    begin, end = float(seen.request_started.min()), float(seen.request_ended.max())
    return np.asarray(begin + seconds * np.arange(int(np.ceil((end - begin) / seconds)) + 1))


def _tokens_by_time(seen: Observation) -> tuple[Floats, Floats]:
    """Cumulative tokens of the device; a step's count at its end."""
    order = np.argsort(seen.step_ended)
    tokens = np.bincount(seen.entry_step, weights=seen.tokens)[order]
    return np.append(0.0, seen.step_ended[order]), np.append(0.0, np.cumsum(tokens))
