"""Server-sent events as bytes: cut a stream into whole events without looking into them."""


class EventCutter:
    """Collects bytes and gives back whole events (each with its blank line), keeping an unfinished rest.

    A backend writes one event at a time, so almost always what comes in is what goes out, uncopied.
    `limit` bounds an event that never ends (ValueError beyond it).
    """

    __slots__ = ("_limit", "_rest")

    def __init__(self, limit: int = 64 * 1024 * 1024) -> None:
        self._rest = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> bytes:
        """Return all whole events there are now, as one run of bytes; may be empty."""
        if self._rest:
            seam = self._rest[-3:] + data
            self._rest += data
            if b"\n\n" not in seam and b"\r\n\r\n" not in seam:  # long events come in many pieces
                self._check()
                return b""
            data, self._rest = bytes(self._rest), bytearray()
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            return data
        end = max(_after(data, b"\n\n"), _after(data, b"\r\n\r\n"))
        self._rest += data[end:]
        self._check()
        return data[:end]

    @property
    def is_amid(self) -> bool:
        """Whether an event has begun to come."""
        return bool(self._rest)

    def rest(self) -> bytes:
        """What is left at the end of the stream, closed with a blank line where one is missing."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest.rstrip(b"\r\n") + b"\n\n" if rest.strip() else b""

    def _check(self) -> None:
        if len(self._rest) > self._limit:
            raise ValueError(f"an event of the stream is longer than {self._limit} bytes")


def _after(data: bytes, mark: bytes) -> int:
    found = data.rfind(mark)
    return found + len(mark) if found >= 0 else 0


def events(run: bytes) -> list[bytes]:
    """Split a run of whole events into single ones, each with its blank line."""
    normal = run.replace(b"\r\n", b"\n") if b"\r" in run else run
    return [event + b"\n\n" for event in normal.split(b"\n\n") if event]


def count_data(run: bytes) -> int:
    """How many events of a run carry data; comments, such as signs of life, do not."""
    return run.count(b"\ndata:") + run.startswith(b"data:")


def payload(event: bytes) -> bytes:
    """The joined `data:` lines of one event."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def with_payload(event: bytes, data: bytes) -> bytes:
    """The same event (its `event:` and `id:` lines kept) with other data."""
    others = [line for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"\n".join([*others, *(b"data: " + line for line in data.split(b"\n"))]) + b"\n\n"


def comment(text: bytes) -> bytes:
    return b": " + text + b"\n\n"


def event(data: bytes) -> bytes:
    """One event with these data."""
    return with_payload(b"", data)
