"""The end of a stream: hold back the event that carries usage and the one that ends it, until the receipt is known."""

from proxy.errors import ApiError
from proxy.relay import sse
from proxy.relay.dialects import Answer, Dialect, Role

_COMMENT = b"energy "
_OTHERS_COMMENT = b": " + _COMMENT + b"{"


class Sifter:
    """Lets a stream's events pass and keeps its carrier and its terminal event back.

    `show_carrier` is False where the usage chunk was asked for by the proxy and not by the client. `failure` is the
    error that the backend told. Another proxy's energy comment stays behind: the figures are ours to tell.
    """

    __slots__ = ("_carrier", "_dialect", "_show_carrier", "_terminal", "failure")

    def __init__(self, dialect: Dialect, show_carrier: bool) -> None:
        self._dialect = dialect
        self._show_carrier = show_carrier
        self._carrier: bytes | None = None
        self._terminal: bytes | None = None
        self.failure: ApiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the event that ends the stream has come, and no other can."""
        return self._terminal is not None and self._dialect.ends_once

    def sift(self, run: bytes) -> bytes:
        """Take a run of whole events; return what may go out now."""
        if self._carrier is None and self._terminal is None and not self._is_suspect(run):
            return run
        return b"".join(self._pass(event) for event in sse.events(run))

    def answer(self) -> Answer:
        return Answer() if self._carrier is None else self._dialect.answer(self._carrier)

    def close(self, energy: bytes | None, error: ApiError | None = None) -> bytes:
        """The last bytes of the stream: carrier with the receipt, error, energy comment, terminal event."""
        carrier = self._carrier if self._show_carrier else None
        if carrier is not None and energy is not None:
            carrier = self._dialect.with_energy(carrier, energy)
        comment = sse.comment(_COMMENT + energy) if energy is not None else b""
        failure = self._dialect.error_event(error) if error is not None else b""
        if self._carrier is not None and self._carrier is self._terminal:
            return failure + comment + (carrier or b"")
        return (carrier or b"") + failure + comment + (self._terminal or self._dialect.terminal_event())

    def _is_suspect(self, run: bytes) -> bool:
        return self._dialect.suspects(run) or _OTHERS_COMMENT in run

    def _pass(self, event: bytes) -> bytes:
        if event.startswith(_OTHERS_COMMENT):
            return b""
        role = self._dialect.role(event)
        out = b""
        if role is Role.PASS:
            return self._release() + event if self._terminal is not None else event
        if Role.FAILURE in role:
            self.failure = self._dialect.failure(event)
        if Role.CARRIER in role:
            out = self._release()
            self._carrier = event
        if Role.TERMINAL in role:
            self._terminal = event
        return out

    def _release(self) -> bytes:
        """More came after what looked like the end: let go of what was held."""
        carrier, terminal = self._carrier, self._terminal
        self._carrier = self._terminal = None
        shown = carrier if self._show_carrier and carrier is not None else b""
        return shown if terminal is None or terminal is carrier else shown + terminal
