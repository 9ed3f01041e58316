"""Which backend keeps which stored response: what `/v1/responses/{id}` is forwarded by."""

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from proxy.routing.registry import Route

_LONGEST_ID = 128


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`key` is the client's whose response it is; nobody else (but an admin) learns that it exists."""

    route: Route
    key: str | None


class StoredResponses:
    """The last `capacity` responses; the oldest is forgotten first, and its id is then unknown."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._known: OrderedDict[str, StoredResponse] = OrderedDict()

    def remember(self, told: msgspec.Raw, route: Route, key: str | None) -> None:
        """`told` is the JSON of the `id` that the backend gave; what is no such id is not kept."""
        try:
            id_ = msgspec.json.decode(told, type=str)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError):
            return
        if not 0 < len(id_) <= _LONGEST_ID:
            return
        self._known[id_] = StoredResponse(route, key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def find(self, id_: str) -> StoredResponse | None:
        return self._known.get(id_)

    def forget(self, id_: str) -> None:
        self._known.pop(id_, None)
