"""Which finished requests have settled: decided for all of them at once, device by device."""

from collections.abc import Collection, Mapping

import numpy as np

from proxy.energy.backend import GRACE, Backend
from proxy.energy.device import DeviceBook
from proxy.energy.pending import Bools, Ints
from proxy.energy.registry import NEVER, PROXY_INDEX, Registry


def done(
    registry: Registry,
    backends: Collection[Backend],
    devices: Mapping[str, DeviceBook],
    slots: Ints,
    now: int,
    settle_after: int,
) -> Bools:
    """For each finished request, whether every window that overlaps it has settled, or will never come.

    The devices that concern a request are those of its backend and of the proxy, and those on which it worked.
    """
    finished = registry.ended[slots]
    is_done: Bools = np.ones(len(slots), dtype=bool)
    is_concerned: Bools = np.zeros(len(slots), dtype=bool)
    for name, book in devices.items():
        if book.settled_until is None:
            continue
        uses = np.array([name in backend.devices for backend in backends])
        concerned = uses[registry.backend[slots]] | uses[PROXY_INDEX]
        # A look at new steps is spared while it could not change anything: work only adds to what is waited for.
        possible = ~concerned | (finished <= book.settled_until) | (finished <= now - settle_after)
        if (possible & is_done).any():
            book.look()
            worked_until = book.tallies.last_end[slots]
            concerned |= worked_until > NEVER
            possible = ~concerned | _is_settled_on(book, np.maximum(finished, worked_until), now - settle_after)
        is_done &= possible
        is_concerned |= concerned
    if devices:  # a backend may yet tell for the first time
        is_done &= is_concerned | (finished <= now - GRACE)
    return is_done


def _is_settled_on(book: DeviceBook, until: Ints, given_up: int) -> Bools:
    assert book.settled_until is not None
    pending_from = book.windows[0].start if book.windows else None
    overlapped = until > pending_from if pending_from is not None else np.zeros(len(until), dtype=bool)
    settled: Bools = (until <= book.settled_until) | ((until <= given_up) & ~overlapped)
    return settled
