"""An inference engine with continuous batching and chunked prefill, as seen by its scheduler.

Sequences that decode get one token each; what is left of a step's token budget goes to prompts, in order of arrival, in
chunks. A request may have several sequences (`n=2`), a cached prefix (context held but not computed), or be cancelled.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.attribution.gpu import Floats, Ints

TOKEN_BUDGET = 2048
MAX_SEQUENCES = 256
CACHE_BLOCK = 16
#: An engine learns of a cancellation late: this many steps still run for nobody.
STEPS_AFTER_CANCEL = 2


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals; log-normal prompt and output lengths (medians in tokens)."""

    requests_per_second: float
    prompt_median: float = 350.0
    prompt_sigma: float = 0.9
    prompt_limit: int = 6000
    output_median: float = 225.0
    output_sigma: float = 0.7
    output_limit: int = 1500
    cached_ratio: float = 0.3
    several_ratio: float = 0.02
    cancelled_ratio: float = 0.02


@dataclass(frozen=True, slots=True)
class Sequences:
    """Column-wise, by arrival. `request` numbers the backend's requests; `cached` prompt tokens need no computing."""

    request: Ints
    arrived: Floats
    cached: Ints
    prompt: Ints
    output: Ints
    cancelled: Ints

    def __len__(self) -> int:
        return len(self.request)


def draw(traffic: Traffic, begin: float, seconds: float, rng: np.random.Generator) -> Sequences:
    """The requests of `seconds` of traffic, at least one."""
    count = max(int(rng.poisson(traffic.requests_per_second * seconds)), 1)
    arrived = np.sort(rng.uniform(begin, begin + seconds, count))
    prompt = _lengths(traffic.prompt_median, traffic.prompt_sigma, 8, traffic.prompt_limit, count, rng)
    output = _lengths(traffic.output_median, traffic.output_sigma, 1, traffic.output_limit, count, rng)
    reused = rng.uniform(0.2, 0.9, count) * (rng.random(count) < traffic.cached_ratio)
    cached = np.minimum((prompt * reused).astype(np.int64) // CACHE_BLOCK * CACHE_BLOCK, prompt - 1)
    cancelled = (rng.random(count) < traffic.cancelled_ratio) & (output > 2 * STEPS_AFTER_CANCEL)
    copies = np.where(rng.random(count) < traffic.several_ratio, 2, 1)
    repeat = np.repeat(np.arange(count), copies)
    return Sequences(
        repeat, arrived[repeat], cached[repeat], prompt[repeat], output[repeat], cancelled[repeat].astype(np.int64)
    )


def _lengths(median: float, sigma: float, low: int, high: int, count: int, rng: np.random.Generator) -> Ints:
    return np.clip(rng.lognormal(np.log(median), sigma, count), low, high).astype(np.int64)


class Batch(NamedTuple):
    """One step's sequences (indices), the tokens each computes, its context at the end, and who samples a token."""

    sequences: Ints
    tokens: Ints
    contexts: Ints
    sampled: "np.typing.NDArray[np.bool_]"


class Engine:
    """Decides who is in the next step; knows nothing of time beyond who has arrived."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self._total = sequences.prompt + sequences.output - 1  # the last token sampled is never computed
        self._context = sequences.cached.copy()
        self._running = np.empty(0, dtype=np.int64)
        self._next = 0

    @property
    def finished(self) -> bool:
        return self._next == len(self.sequences) and len(self._running) == 0

    def ready_at(self, now: float) -> float:
        """When there is something to run: now, or at the next arrival."""
        if len(self._running):
            return now
        return max(now, float(self.sequences.arrived[self._next])) if self._next < len(self.sequences) else np.inf

    def schedule(self, now: float) -> Batch:
        """The next step (`ready_at(now) <= now` must hold)."""
        self._admit(now)
        running = self._running
        wanted = np.maximum(self.sequences.prompt[running] - self._context[running], 1)
        decoding = wanted == 1
        before = np.cumsum(np.where(decoding, 0, wanted)) - np.where(decoding, 0, wanted)
        budget = TOKEN_BUDGET - int(decoding.sum())
        tokens = np.where(decoding, 1, np.minimum(wanted, np.maximum(budget - before, 0)))
        chosen = tokens > 0
        sequences, tokens = running[chosen], tokens[chosen]
        contexts = self._context[sequences] + tokens
        return Batch(sequences, tokens, contexts, contexts >= self.sequences.prompt[sequences])

    def complete(self, batch: Batch) -> Ints:
        """Take in a step's results; returns the sequences that are done."""
        self._context[batch.sequences] = batch.contexts
        done = batch.sequences[batch.contexts >= self._total[batch.sequences]]
        if len(done):
            self._running = self._running[self._context[self._running] < self._total[self._running]]
        return np.asarray(done)

    def answered(self, batch: Batch) -> Ints:
        """The sequences whose client got (or gave up on) its last token in this step; call before `complete`."""
        late = self.sequences.cancelled[batch.sequences] * STEPS_AFTER_CANCEL
        return np.asarray(batch.sequences[batch.contexts == self._total[batch.sequences] - late])

    def _admit(self, now: float) -> None:
        arrived = int(np.searchsorted(self.sequences.arrived, now, side="right"))
        newcomers = min(arrived, self._next + MAX_SEQUENCES - len(self._running))
        if newcomers > self._next:
            self._running = np.concatenate([self._running, np.arange(self._next, newcomers)])
            self._next = newcomers
