"""What tells that requests belong together, so that one replica's caches serve them all."""

from collections.abc import Iterable

from proxy.relay.call import Call
from proxy.relay.heads import ChatHead
from proxy.routing.registry import Affinity

_SESSION_HEADER = b"x-session-id"
_PREFIX_MESSAGES = 2  # the system prompt and the first turn: the same throughout a conversation
_PREFIX_BYTES = 1024


def affinity_of(affinity: Affinity, headers: Iterable[tuple[bytes, bytes]], call: Call) -> bytes | None:
    """The request's group by the model's `affinity`; None if it belongs to none."""
    if affinity == "none":
        return None
    session = next((value for name, value in headers if name == _SESSION_HEADER), None)
    if session is not None or affinity == "session":
        return session
    if isinstance(call.head, ChatHead):
        return b"".join(bytes(message) for message in call.head.messages[:_PREFIX_MESSAGES])
    return call.body[:_PREFIX_BYTES]
