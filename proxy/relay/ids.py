"""Ids of requests: 128 random bits, always ours; the kernel is asked for many at a time."""

import secrets
from collections.abc import Iterator

_BYTES = 16
_DRAWN = 64


def _drawn() -> Iterator[str]:
    while True:
        text = secrets.token_hex(_BYTES * _DRAWN)
        for at in range(0, len(text), 2 * _BYTES):
            yield text[at : at + 2 * _BYTES]


_ids = _drawn()


def new_id() -> str:
    """A request's id, in hexadecimal digits."""
    return next(_ids)
