"""How one window's energy is divided among its accounts: in proportion to what is predicted of each, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxy.energy.pending import Floats, Ints, Steps
from proxy.energy.registry import UNATTRIBUTED
from proxy.energy.rounding import largest_remainder
from proxy.energy.spans import LoadingSpans, Use, covered
from proxy.energy.timeline import Window


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of a window: the steps in it, and the part of each that lay in it.

    `busy` nanoseconds of it had at least one step, `loading` others a loading backend.
    """

    window: Window
    steps: Steps
    part: Floats
    busy: int
    loading: int
    use: Use

    @property
    def gap(self) -> int:
        """Nanoseconds in which nothing of ours ran."""
        return self.window.length - self.busy - self.loading


@dataclass(frozen=True, slots=True)
class Division:
    """Microjoules by account; `slots` has those of the requests, and of nobody known at its first place."""

    idle: int
    foreign: int
    slots: Ints


def scene_of(window: Window, pending: Steps, loading: LoadingSpans, use: Use) -> Scene:
    overlap = pending.overlap(window.start, window.end)
    inside = overlap > 0
    steps = pending.where(inside)
    busy = covered(steps.started, steps.ended, window.start, window.end)
    part = overlap[inside] / (steps.ended - steps.started)
    return Scene(window, steps, part, busy, _loading_beside(steps, busy, loading, window), use)


def _loading_beside(steps: Steps, busy: int, loading: LoadingSpans, window: Window) -> int:
    if not loading:
        return 0
    starts, ends = loading.columns()
    both = np.concatenate((steps.started, starts)), np.concatenate((steps.ended, ends))
    return covered(*both, window.start, window.end) - busy


def lengths_alone(steps: Steps) -> Floats:
    """Nanoseconds that each step would have taken had it not shared the device's time with other backends' steps."""
    lengths = steps.lengths
    if not len(steps) or (steps.backend == steps.backend[0]).all():
        return lengths
    begin = np.maximum(steps.started[:, None], steps.started)
    end = np.minimum(steps.ended[:, None], steps.ended)
    others = steps.backend[:, None] != steps.backend
    shared = (np.maximum(end - begin, 0) * others).sum(axis=1)
    alone: Floats = lengths / (1 + shared / lengths)
    return alone


def divide(scene: Scene, prices: Floats, idle_watts: float | None, guessed_watts: float, slots: int) -> Division:
    """Divide the window, given microjoules for the steps' parts in it, by entry; `slots` is how many there are.

    `idle_watts` is None until idle power is known; `guessed_watts` must do then.
    """
    by_slot = np.bincount(scene.steps.slot, weights=prices, minlength=slots).astype(np.float64)
    predicted = float(by_slot.sum())
    if predicted > 0 or scene.loading:
        watts = guessed_watts if idle_watts is None else idle_watts
        idle, foreign, loading, ours = _shared(scene, predicted, watts)
    else:
        idle, foreign = _unused(scene, idle_watts)
        loading = ours = 0.0
    by_slot *= ours / max(predicted, 1e-300)
    by_slot[UNATTRIBUTED] += loading
    parts = largest_remainder(scene.window.energy, np.concatenate(([idle, foreign], by_slot)))
    return Division(int(parts[0]), int(parts[1]), parts[2:])


def _unused(scene: Scene, idle_watts: float | None) -> tuple[float, float]:
    """Idle and foreign parts of a window in which nothing of ours ran; foreign is only what exceeds idle, if known."""
    energy = float(scene.window.energy)
    floor = 0.0 if idle_watts is None else min(energy, idle_watts * scene.window.length / 1e3)
    foreign = scene.use.foreign * (energy - floor)
    return energy - foreign, foreign


def _shared(scene: Scene, predicted: float, idle_watts: float) -> tuple[float, float, float, float]:
    """Idle, foreign, loading and our steps' parts. A loading backend is taken to draw the mean power."""
    energy = scene.window.energy
    mean = energy / scene.window.length
    idle = min(idle_watts / 1e3, mean) * scene.gap if not predicted else idle_watts / 1e3 * scene.gap
    loading = energy - idle if not predicted else mean * scene.loading
    scale = energy / (idle + loading + predicted)
    active = energy - idle * scale
    foreign = scene.use.foreign * active
    rest = max(active - foreign, 0.0) / (predicted + loading)
    return idle * scale, foreign, loading * rest, predicted * rest


def priced_by_processes(scene: Scene, prices: Floats, backends: Sequence[str]) -> Floats:
    """Where CPU time tells each backend's part of a window, that prices the split between them."""
    shares = scene.use.backends
    if not shares or not len(scene.steps):
        return prices
    backend = scene.steps.backend[scene.steps.owner]
    predicted = np.bincount(backend, weights=prices, minlength=len(backends))
    told = np.array([shares.get(name, 0.0) for name in backends]) * (predicted > 0)
    if told.sum() <= 1e-9:
        return prices
    factor = np.divide(told, predicted, out=np.zeros_like(predicted), where=predicted > 0)
    priced: Floats = prices * (factor * (predicted.sum() / told.sum()))[backend]
    return priced
