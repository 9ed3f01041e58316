"""`joulegate receipts`: what the configured store holds, with or without a running proxy."""

import sys

from rich.console import Console

from proxy.api.listing import encode_page, receipts_table
from proxy.config import Config
from proxy.errors import ConfigError
from proxy.settings import receipt_store


def show(config: Config, *, limit: int, after: str | None, model: str | None, as_json: bool) -> None:
    """Print a page of receipts; raises ConfigError for an unknown `after`, or StoreUnavailable."""
    store = receipt_store(config.store)
    try:
        page = store.list(limit=limit, after=after, model=model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        store.close()
    if as_json:
        sys.stdout.write(encode_page(page).decode() + "\n")
        return
    # A pipe has no width: there, no column is cut.
    Console(width=None if sys.stdout.isatty() else 240).print(receipts_table(page.receipts))
    if page.has_more:
        Console(stderr=True, highlight=False).print(f"There are more: --after {page.receipts[-1].id}")
