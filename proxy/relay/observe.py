"""Virtual steps: what the relay can tell of a request's work when its backend does not report steps.

Prefill lasts until the first token, then every group of tokens is one step. Token counts are those the stream shows
while it runs (one event is one token) and the backend's own usage at the end; a prompt's length is not told before the
answer ends, so until then it is estimated from the request's size. The method of such receipts is `measured-tokens`.
"""

from collections.abc import Callable

from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import Tokens
from proxy.relay.dialects import Timings

#: (started, ended, tokens, context)
EmitStep = Callable[[Nanoseconds, Nanoseconds, int, int], None]

_GROUP = Nanoseconds(250_000_000)
_BYTES_PER_TOKEN = 4


class Observation:
    """Watches one attempt go by and emits virtual steps, so that energy can settle while it runs."""

    __slots__ = ("_emit", "_group_tokens", "_prompt", "_seen", "_since")

    def __init__(self, emit: EmitStep, started: Nanoseconds, body_bytes: int) -> None:
        self._emit = emit
        self._since = started
        self._prompt = max(1, body_bytes // _BYTES_PER_TOKEN)
        self._seen = 0
        self._group_tokens = 0

    def events(self, count: int, at: Nanoseconds) -> None:
        """`count` events of a stream came by: tokens, as far as anyone outside can tell."""
        if self._seen == 0:
            self._step(at, self._prompt, self._prompt)
        else:
            self._group_tokens += count
        self._seen += count
        if at - self._since >= _GROUP:
            self._close_group(at)

    def waiting(self, at: Nanoseconds, silent: Nanoseconds) -> None:
        """Nothing was seen for `silent`: what was done meanwhile was for this request, how much is unknown."""
        if at - self._since >= silent:
            self._step(at, self._group_tokens, 0)

    def end(self, at: Nanoseconds, tokens: Tokens, timings: Timings | None) -> None:
        """The answer is over; `tokens` and `timings` are the backend's own, where it tells them."""
        if self._seen > 0:
            self._close_group(at)
        elif timings is not None and timings.prompt_ms + timings.predicted_ms > 0:
            self._split(at, timings)
        else:
            work = (tokens.prompt or 0) + (tokens.completion or 0)
            self._step(at, work, work)

    def _split(self, at: Nanoseconds, timings: Timings) -> None:
        prompt = timings.prompt_n
        share = timings.prompt_ms / (timings.prompt_ms + timings.predicted_ms)
        middle = Nanoseconds(self._since + round((at - self._since) * share))
        self._step(middle, prompt, prompt)
        self._step(at, timings.predicted_n, prompt + timings.predicted_n)

    def _close_group(self, at: Nanoseconds) -> None:
        if self._group_tokens > 0:
            self._step(at, self._group_tokens, self._prompt + self._seen)

    def _step(self, at: Nanoseconds, tokens: int, context: int) -> None:
        started, self._since = self._since, max(at, self._since)
        self._group_tokens = 0
        if at > started:
            self._emit(started, at, tokens, context)
