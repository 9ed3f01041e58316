"""Receipts kept: written in batches behind the data path, read by id or page by page."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, and_, or_, select
from sqlalchemy.exc import SQLAlchemyError

from proxy.energy.carbon import Intensity
from proxy.energy.quantities import Seconds
from proxy.energy.receipt import Boundary, Figures, Receipt, Request, Tokens
from proxy.store.database import Database, StoreUnavailable
from proxy.store.schema import receipts
from proxy.store.writer import StoreHealth, Writer

MAXIMUM_PAGE = 1000
_ROWS_AT_A_TIME = 40


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """`document` is the `energy` object as JSON; `key` names whose request it was."""

    id: str
    created: float
    key: str | None
    document: bytes


@dataclass(frozen=True, slots=True)
class Page:
    receipts: Sequence[StoredReceipt]
    has_more: bool


@dataclass(frozen=True, slots=True)
class _Details:
    """What a receipt says beyond its row's columns: shorter than the `energy` object, and far cheaper to make."""

    figures: Figures | None
    boundary: Boundary
    intensity: Intensity


_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(_Details).decode
#: How the documents of the first version begin: they hold the whole object.
_WHOLE = b'{"object":'


class ReceiptStore:
    """`put` never blocks and never fails; `get`, `list` and `close` block and belong on a thread of their own.

    A receipt is put when it is provisional and put again when it has settled; a settled one is never overwritten by a
    provisional one. A crash loses what was put within the last `flush_seconds` (at most a second).
    """

    def __init__(
        self,
        url: str,
        encode: Callable[[Receipt], bytes],
        *,
        flush_seconds: float = 0.25,
        capacity: int = 20_000,
    ) -> None:
        self._encode = encode
        self._database = Database(url)
        self._writer = Writer(self._database, self._upsert, flush_seconds=flush_seconds, capacity=capacity)

    def put(self, receipt: Receipt) -> None:
        self._writer.put(receipt)

    def get(self, receipt_id: str) -> StoredReceipt | None:
        """None if there is no such receipt; StoreUnavailable if nobody can tell."""
        waiting = self._writer.waiting(receipt_id)
        if waiting is not None:
            request = waiting.request
            return StoredReceipt(request.id, request.created, request.key, self._encode(waiting))
        rows = self._read(select(receipts).where(receipts.c.id == receipt_id))
        return self._stored(rows[0]) if rows else None

    def list(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        model: str | None = None,
        task: str | None = None,
        key: str | None = None,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> Page:
        """The newest first, after the receipt `after`; `since` ≤ created < `until` (Unix seconds).

        ValueError for a limit outside 1..1000 or an unknown `after`; StoreUnavailable if the store cannot be read.
        """
        if not 1 <= limit <= MAXIMUM_PAGE:
            raise ValueError(f"limit: should be from 1 to {MAXIMUM_PAGE}, not {limit}")
        self._writer.flush()
        equal = {"model": model, "task": task, "key": key, "status": status}
        query = select(receipts).where(
            *(receipts.c[name] == value for name, value in equal.items() if value is not None)
        )
        if since is not None:
            query = query.where(receipts.c.created >= since)
        if until is not None:
            query = query.where(receipts.c.created < until)
        if after is not None:
            query = self._older_than(query, after)
        newest_first = query.order_by(receipts.c.created.desc(), receipts.c.id.desc()).limit(limit + 1)
        rows = self._read(newest_first)
        return Page([self._stored(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def health(self) -> StoreHealth:
        return self._writer.health()

    def flush(self, timeout: float = 2.0) -> bool:
        """Wait until all that was put before is written; False if it was not in time."""
        return self._writer.flush(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, then end the thread; what could not be written is counted and logged."""
        self._writer.close(timeout)
        self._database.close()

    def _older_than(self, query: Select[Any], after: str) -> Select[Any]:
        rows = self._read(select(receipts).where(receipts.c.id == after))
        if not rows:
            raise ValueError(f"after: there is no receipt {after!r}")
        created, last = rows[0].created, rows[0].id
        return query.where(or_(receipts.c.created < created, and_(receipts.c.created == created, receipts.c.id < last)))

    def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        try:
            with self._database.open().connect() as connection:
                return connection.execute(query).all()
        except SQLAlchemyError as error:
            raise self._database.unavailable(error) from error

    def _upsert(self, connection: Connection, batch: Iterable[Receipt], breathe: Callable[[], None]) -> None:
        """In the driver's own words: to compile a statement's parameters for each row would be most of the cost.

        A few rows at a time: this thread and the event loop's may have but one processor, and requests go first.
        """
        statement, left = _UPSERT[connection.dialect.name], iter(batch)
        some = [self._row(receipt) for receipt in islice(left, _ROWS_AT_A_TIME)]
        while some:
            connection.exec_driver_sql(statement, some)
            some = [self._row(receipt) for receipt in islice(left, _ROWS_AT_A_TIME)]
            if some:
                breathe()

    @staticmethod
    def _row(receipt: Receipt) -> tuple[Any, ...]:
        """In the order of the table's columns."""
        request, figures, tokens = receipt.request, receipt.figures, receipt.tokens
        return (
            request.id,
            request.created,
            request.model,
            request.task,
            request.endpoint,
            request.key,
            request.client_request_id,
            receipt.status,
            receipt.outcome,
            figures.method if figures else None,
            figures.parts.total if figures else None,
            figures.operational if figures else None,
            receipt.duration,
            tokens.prompt,
            tokens.completion,
            tokens.cached,
            _pack(_Details(figures, receipt.boundary, receipt.intensity)).decode(),
        )

    def _stored(self, row: Row[Any]) -> StoredReceipt:
        document = row.document.encode()
        if not document.startswith(_WHOLE):
            document = self._encode(_receipt(row, _unpack(document)))
        return StoredReceipt(row.id, row.created, row.key, document)


def _upsert_statement(placeholder: str) -> str:
    """A placeholder for each column in order; a settled receipt is not overwritten by a provisional one."""
    names = [f'"{column.name}"' for column in receipts.columns]
    updates = ", ".join(f"{name} = excluded.{name}" for name in names if name != '"id"')
    return (
        f"INSERT INTO receipts ({', '.join(names)}) VALUES ({', '.join([placeholder] * len(names))}) "  # noqa: S608
        f"ON CONFLICT (id) DO UPDATE SET {updates} WHERE receipts.status <> 'settled' OR excluded.status = 'settled'"
    )


_UPSERT = {"sqlite": _upsert_statement("?"), "postgresql": _upsert_statement("%s")}


def _receipt(row: Row[Any], details: _Details) -> Receipt:
    return Receipt(
        request=Request(row.id, row.model, row.task, row.endpoint, row.created, row.client_request_id, row.key),
        status=row.status,
        outcome=row.outcome,
        duration=Seconds(row.duration_seconds),
        tokens=Tokens(row.prompt_tokens, row.completion_tokens, row.cached_tokens),
        boundary=details.boundary,
        intensity=details.intensity,
        figures=details.figures,
    )


__all__ = ["MAXIMUM_PAGE", "Page", "ReceiptStore", "StoreHealth", "StoreUnavailable", "StoredReceipt"]
