"""Pages of stored receipts, as OpenAI's lists and as a table for people."""

from collections.abc import Iterable

import msgspec
from rich.table import Table

from proxy.api.receipts import fixed_point
from proxy.store.receipts import Page, StoredReceipt


class _Carbon(msgspec.Struct):
    grams_co2e: float | None = None


class _Shown(msgspec.Struct):
    """What the table shows of a receipt."""

    id: str
    model: str
    task: str
    outcome: str | None
    status: str
    energy_joules: float | None
    low_joules: float | None
    high_joules: float | None
    method: str | None
    duration_seconds: float
    carbon: _Carbon


_shown = msgspec.json.Decoder(_Shown).decode


def encode_page(page: Page) -> bytes:
    data = [msgspec.Raw(receipt.document) for receipt in page.receipts]
    return msgspec.json.encode({"object": "list", "data": data, "has_more": page.has_more})


def receipts_table(receipts: Iterable[StoredReceipt]) -> Table:
    table = Table("id", "model", "task", "outcome", "status", "joules", "interval", "grams CO2e", "seconds", "method")
    for receipt in receipts:
        shown = _shown(receipt.document)
        interval = f"{_figure(shown.low_joules)}-{_figure(shown.high_joules)}" if shown.low_joules is not None else "-"
        table.add_row(
            shown.id,
            shown.model,
            shown.task,
            shown.outcome or "-",
            shown.status,
            _figure(shown.energy_joules),
            interval,
            _figure(shown.carbon.grams_co2e),
            f"{shown.duration_seconds:.3f}",
            shown.method or "-",
        )
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else fixed_point(value)
