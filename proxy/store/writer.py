"""The thread behind the data path that writes receipts in batches and outlives any failure of the database."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from proxy.energy.receipt import Receipt
from proxy.store.database import Database, StoreUnavailable

logger = logging.getLogger(__name__)

#: Small, because encoding a batch holds the interpreter that also serves the data path.
_BATCH = 1000
#: With more than these waiting the thread does not step aside for requests any more.
_BACKLOG = 2 * _BATCH
_PAUSE_SECONDS = 0.001
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 15.0
#: What a row is to blame for, and not the database.
_BAD_ROW = (DataError, IntegrityError, ValueError, TypeError, OverflowError)
#: A store that stays down is said again this often, not at every attempt.
_REPEAT_LOG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """`up` is whether the last attempt to write succeeded; `dropped` counts receipts that were never written."""

    up: bool
    waiting: int
    written: int
    dropped: int
    error: str | None


class Writer:
    """Receipts wait in a bounded dict by id, so that a settled one replaces the provisional one still waiting."""

    def __init__(
        self,
        database: Database,
        write: Callable[[Connection, Iterable[Receipt], Callable[[], None]], None],
        *,
        flush_seconds: float,
        capacity: int,
    ) -> None:
        self._database = database
        self._write = write
        self._flush_seconds = flush_seconds
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: dict[str, Receipt] = {}
        self._in_flight: dict[str, Receipt] = {}
        self._since = 0.0
        self._hurry = False
        self._closing = False
        self._written = 0
        self._dropped = 0
        self._error: str | None = None
        self._said_at = 0.0
        self._dropped_said_at = 0.0
        self._thread = threading.Thread(target=self._run, name="receipt-writer", daemon=True)
        self._thread.start()

    def put(self, receipt: Receipt) -> None:
        with self._changed:
            identity = receipt.request.id
            before = self._waiting.get(identity)
            if before is not None and before.status == "settled" != receipt.status:
                return
            if self._closing or (before is None and len(self._waiting) >= self._capacity):
                self._drop()
                return
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting[identity] = receipt
            if len(self._waiting) in {1, _BATCH}:
                # In between, the thread sleeps until its time has come: waking it per receipt would cost the data path.
                self._changed.notify_all()

    def waiting(self, receipt_id: str) -> Receipt | None:
        with self._changed:
            return self._waiting.get(receipt_id) or self._in_flight.get(receipt_id)

    def flush(self, timeout: float = 2.0) -> bool:
        """Wait until nothing waits; at once False while the store is down."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._error is not None, timeout)
            return self._idle()

    def health(self) -> StoreHealth:
        with self._changed:
            waiting = len(self._waiting) + len(self._in_flight)
            return StoreHealth(self._error is None, waiting, self._written, self._dropped, self._error)

    def close(self, timeout: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            lost = len(self._waiting) + len(self._in_flight)
            if lost:
                self._dropped += lost
                logger.error("%d receipts were not written when the store closed: %s", lost, self._error)

    def _idle(self) -> bool:
        return not self._waiting and not self._in_flight

    def _run(self) -> None:
        retry = _FIRST_RETRY_SECONDS
        while self._take():
            error = self._attempt()
            self._done(error)
            if error is None:
                retry = _FIRST_RETRY_SECONDS
                continue
            with self._changed:
                if self._closing:
                    return
                self._changed.wait_for(lambda: self._closing, retry)
            retry = min(2 * retry, _LAST_RETRY_SECONDS)

    def _take(self) -> bool:
        """Move the next batch in flight once it is due; False when there will be none any more."""
        with self._changed:
            while not self._due():
                if self._closing and not self._waiting:
                    return False
                self._changed.wait(self._since + self._flush_seconds - time.monotonic() if self._waiting else None)
            for identity in list(islice(self._waiting, _BATCH)):
                self._in_flight[identity] = self._waiting.pop(identity)
            return True

    def _due(self) -> bool:
        if not self._waiting:
            self._hurry = False
            return False
        grown = len(self._waiting) >= _BATCH
        return grown or self._hurry or self._closing or time.monotonic() - self._since >= self._flush_seconds

    def _attempt(self) -> StoreUnavailable | None:
        try:
            self._transact(self._in_flight.values())
        except StoreUnavailable as error:
            return error
        except _BAD_ROW:
            return self._one_by_one()
        except SQLAlchemyError as error:
            return self._database.unavailable(error)
        return None

    def _one_by_one(self) -> StoreUnavailable | None:
        """A row the database refuses must not hold up the others for ever: it is dropped, counted and named."""
        for identity, receipt in list(self._in_flight.items()):
            try:
                self._transact([receipt])
            except StoreUnavailable as error:
                return error
            except _BAD_ROW as error:
                with self._changed:
                    self._dropped += 1
                    del self._in_flight[identity]
                logger.error("Receipt %s is dropped, the store refuses it: %s", identity, type(error).__name__)
            except SQLAlchemyError as error:
                return self._database.unavailable(error)
        return None

    def _transact(self, batch: Iterable[Receipt]) -> None:
        with self._database.open().begin() as connection:
            self._write(connection, batch, self._breathe)

    def _breathe(self) -> None:
        """Let requests go first, unless somebody waits for what is written or too much waits to be."""
        if not (self._hurry or self._closing or len(self._waiting) > _BACKLOG):
            time.sleep(_PAUSE_SECONDS)

    def _done(self, error: StoreUnavailable | None) -> None:
        with self._changed:
            if error is None:
                self._written += len(self._in_flight)
                if self._error is not None:
                    logger.warning("The store can be written again; %d receipts were waiting", len(self._in_flight))
            else:
                self._say(str(error))
                # What came meanwhile is newer: it wins over what goes back, and goes behind it.
                self._waiting = self._in_flight | self._waiting
            self._in_flight = {}
            self._error = None if error is None else str(error)
            self._changed.notify_all()

    def _say(self, error: str) -> None:
        now = time.monotonic()
        if error != self._error or now - self._said_at >= _REPEAT_LOG_SECONDS:
            self._said_at = now
            logger.error("Receipts wait in memory (%d): %s", len(self._in_flight) + len(self._waiting), error)

    def _drop(self) -> None:
        self._dropped += 1
        now = time.monotonic()
        if now - self._dropped_said_at >= _REPEAT_LOG_SECONDS or self._dropped == 1:
            self._dropped_said_at = now
            logger.error(
                "Receipts are dropped (%d so far): %d wait to be written and no more may; %s",
                self._dropped,
                self._capacity,
                self._error or "the store is slower than the requests come: use a faster disk or postgresql://",
            )
