"""What one backend's steps cost on one device: DESIGN's roofline durations and step energies, and their fair shares.

A participant computes t tokens and holds k of context; an average token of it attends to s = k - (t - 1) / 2 (a causal
chunk's early tokens see less). A step of n participants takes and uses

    d = launch + launch_sequence·n + max(Σ (compute_token·t + compute_attention·t·s), memory_step + Σ memory_context·k)
    E = step + Σ (sequence + token·t + attention·t·s + context·k) + static_watts·d

in seconds and joules. `docs/cost-model.md` says where the coefficients come from.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from proxy.energy.fit import OnlineFit, Structure
from proxy.energy.intervals import tail_error
from proxy.energy.pending import Floats, Steps
from proxy.energy.shapley import roofline_shares

DURATION = ("launch", "launch_sequence", "compute_token", "compute_attention", "memory_step", "memory_context")
ENERGY = ("step", "sequence", "token", "attention", "context", "static_watts")

#: The tokens at which a step turns from memory- to compute-bound, where nothing tells (accelerators: 150-300).
_KNEE = 200.0
#: Of an unknown model: context tokens that cost as much memory traffic as the weights, and as much compute as a token.
_MEMORY_CONTEXT, _COMPUTE_CONTEXT = 1e5, 3e4
#: How far off a coefficient may be, relative to itself: learnt before, derived from the model's config, or guessed.
_DOUBT_LEARNT, _DOUBT_PRIOR, _DOUBT_GUESS = 0.1, 0.4, 1.0
#: How far single energies may stray from what three powers would make of the durations.
_LOOSE = 0.04
#: A participant's own energy beside static power, as a part of that while its launch lasts.
_SEQUENCE_PART = 0.1
_DURATION_HORIZON = 20_000.0
_DURATION_SIGMA = 0.05
_EAGER_STEPS = 200
#: So many windows make coefficients that were learnt worth more than a prior.
_LEARNT_WINDOWS = 100.0


class PriceOfOne(NamedTuple):
    """Joules of a step with one participant, without any array. The last four are seconds of the roofline."""

    fixed: float
    token: float
    attention: float
    context: float
    static_watts: float
    compute_token: float
    compute_attention: float
    memory_step: float
    memory_context: float

    def joules(self, tokens: int, context: int) -> float:
        fixed, token, attention, held, watts, compute, compute_attention, memory, memory_context = self
        attended = tokens * max(context - (tokens - 1) / 2, 0.0)
        roof = max(compute * tokens + compute_attention * attended, memory + memory_context * context)
        return fixed + token * tokens + attention * attended + held * context + watts * roof


class StepModel:
    """The two fits of one backend on one device. Until it is told or sees something it is a guess without a scale."""

    def __init__(self, coefficients: Mapping[str, float] | None = None) -> None:
        self.seconds: OnlineFit | None = None
        self.energy: Floats | None = None
        """The prior energies, until a fit has better ones."""
        self._powers: Floats | None = None  # of arithmetic, of memory, static; None where energies were learnt before
        self._powers_doubt, self._loose = _DOUBT_GUESS, _LOOSE
        self.windows = 0.0
        self.error, self.spans = 1.0, 0  # of the energy predicted for spans of about a second, relative to it
        if coefficients:
            self._recall(coefficients)

    def _recall(self, coefficients: Mapping[str, float]) -> None:
        learnt = coefficients.get("windows", 0.0) >= _LEARNT_WINDOWS
        doubt = _DOUBT_LEARNT if learnt else _DOUBT_PRIOR
        durations = np.array([coefficients.get(name, 0.0) for name in DURATION])
        energies = np.array([coefficients.get(name, 0.0) for name in ENERGY])
        if (durations > 0).any():
            durations = _floored(durations, _duration_guess(1.0))
            self.seconds = OnlineFit(durations, np.full(len(DURATION), doubt), _DURATION_HORIZON)
        if (energies > 0).any():
            self.energy = _floored(energies, self.basis() @ np.ones(3))
            self._powers_doubt = doubt
            if learnt:
                self._loose = _DOUBT_LEARNT
            elif self.seconds is not None:
                d = self.duration
                self._powers = np.array([self.energy[2] / d[2], self.energy[0] / d[4], self.energy[5]])

    def tail_error(self, window_error: float) -> float:
        """The relative error of what it predicts, where windows are so far from their predictions."""
        return tail_error(window_error, self._powers_doubt, self.windows)

    # --- durations ---

    def learn_durations(self, steps: Steps, seconds: Floats) -> bool:
        """From steps and how long each took; tells whether that changed the coefficients at once."""
        seconds = seconds / steps.repeat
        if self.seconds is None:
            guess = _duration_guess(1.0)
            scale = float(np.median(seconds / self._roofline(steps.sums, guess)))
            self.seconds = OnlineFit(guess * scale, np.full(len(DURATION), _DOUBT_GUESS), _DURATION_HORIZON)
        features = self._duration_features(steps.sums, self.seconds.coefficients)
        self.seconds.add(features, seconds, _DURATION_SIGMA * seconds)
        if self.seconds.rows >= _EAGER_STEPS:
            return False
        self.seconds.solve()
        return True

    @property
    def duration(self) -> Floats:
        return self.seconds.coefficients if self.seconds is not None else _duration_guess(1.0)

    def durations(self, steps: Steps) -> Floats:
        """Predicted seconds of each step."""
        return self._roofline(steps.sums, self.duration)

    @staticmethod
    def _roofline(sums: Floats, c: Floats) -> Floats:
        n, tokens, attention, context = sums.T
        seconds: Floats = c[0] + c[1] * n + np.maximum(c[2] * tokens + c[3] * attention, c[4] + c[5] * context)
        return seconds

    @staticmethod
    def _duration_features(sums: Floats, c: Floats) -> Floats:
        """The duration is linear in its coefficients once it is known which side of the maximum bounds the step."""
        n, tokens, attention, context = sums.T
        compute = c[2] * tokens + c[3] * attention > c[4] + c[5] * context
        features = np.zeros((len(sums), len(DURATION)))
        features[:, 0], features[:, 1] = 1.0, n
        features[compute, 2], features[compute, 3] = tokens[compute], attention[compute]
        features[~compute, 4], features[~compute, 5] = 1.0, context[~compute]
        return features

    # --- energies ---

    def energy_features(self, steps: Steps) -> Floats:
        """(steps, energy coefficients): a step's joules are this times the coefficients."""
        features = np.empty((len(steps.sums), len(ENERGY)))
        features[:, 0] = 1.0
        features[:, 1:5] = steps.sums
        features[:, 5] = self.durations(steps)
        features *= steps.repeat[:, None]
        return features

    def guess_powers(self, watts: float, typical: Floats) -> Floats:
        """A first guess where no prior was given: a busy device draws so many watts, in a step with these sums.

        Two fifths are static, the rest goes with the time that arithmetic and memory are busy.
        """
        _, tokens, attention, context = typical
        d = self.duration
        busy = max(d[2] * tokens + d[3] * attention + d[4] + d[5] * context, 1e-12)
        dynamic = 0.6 * watts * float(self._roofline(typical[None, :], d)[0]) / busy
        return np.array([dynamic, dynamic, 0.4 * watts])

    def basis(self) -> Floats:
        """(energy coefficients, 3): the energies that follow from the durations, were there only three powers.

        A watt of arithmetic, of memory traffic, and of static power, as long as each is busy.
        """
        d = _floored(self.duration, _duration_guess(1.0))  # what was fitted as 0 may still cost energy
        basis = np.zeros((len(ENERGY), 3))
        basis[2, 0], basis[3, 0] = d[2], d[3]
        basis[0, 1], basis[4, 1] = d[4], d[5]
        basis[1, 2], basis[5, 2] = _SEQUENCE_PART * d[1], 1.0
        return basis

    def begin_energy(self, watts: float, typical: Floats) -> None:
        """With the first window: what the device draws gives the guess a scale."""
        if self.energy is None:
            self._powers, self._powers_doubt = self.guess_powers(watts, typical), _DOUBT_GUESS
            self.energy = self.basis() @ self._powers

    def structure(self) -> Structure:
        """What is believed of the energies before any window: their structure, or all that was learnt before."""
        assert self.energy is not None
        if self._powers is None:
            basis, start = self.energy[:, None], np.ones(1)
        else:
            basis, start = self.basis(), self._powers
        doubt = np.full(len(start), self._powers_doubt)
        return Structure(basis, start, doubt, np.full(len(ENERGY), self._loose))

    def price_of_one(self, energy: Floats) -> PriceOfOne:
        """Of a step with one participant, whose share is all of it, with these energies."""
        step, sequence, token, attention, context, static = energy.tolist()
        launch, launch_sequence, *roof = self.duration.tolist()
        fixed = step + sequence + static * (launch + launch_sequence)
        return PriceOfOne(fixed, token, attention, context, static, *roof)

    def price(self, steps: Steps, energy: Floats) -> Floats:
        """Joules of each participant: its Shapley value of its step's energy."""
        d = self.duration
        compute = d[2] * steps.tokens + d[3] * steps.attention
        roof = roofline_shares(compute, d[5] * steps.contexts, d[4], steps.owner, steps.count)
        per_step = (energy[0] + energy[5] * d[0]) / steps.count
        own = energy[1] + energy[5] * d[1] + energy[2] * steps.tokens
        joules: Floats = per_step[steps.owner] + own
        joules += energy[3] * steps.attention + energy[4] * steps.contexts + energy[5] * roof
        joules *= steps.repeat[steps.owner]
        return joules


def _duration_guess(seconds: float) -> Floats:
    """The shape of an unknown transformer on an unknown accelerator, whose lightest step takes about `seconds`."""
    return seconds * np.array(
        [0.15, 0.002, 1 / _KNEE, 1 / _KNEE / _COMPUTE_CONTEXT, 1.0, 1 / _MEMORY_CONTEXT]
    )  # fmt: skip


def _floored(values: Floats, shape: Floats) -> Floats:
    """No coefficient of exactly 0, or the fit could never raise it: a hundredth of a guess of the same size."""
    known = values > 0
    scale = float(np.median(values[known] / shape[known]))
    return np.where(known, values, 0.01 * scale * shape)
