"""Opening a database by URL, and what its failures mean to an operator."""

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from proxy.errors import JoulegateError
from proxy.store.schema import NewerSchema, migrate

#: How long a writer waits for another process's lock before the batch is put off.
_LOCK_SECONDS = 1.0

_SQLITE_CURES = {
    "unable to open": "check that its directory exists and that this user may write there",
    "readonly": "give this user the right to write the file and its directory",
    "locked": "another process holds a lock on it: end that one, or use a postgresql:// store",
    "disk is full": "free some space on its file system",
    "disk i/o": "check the disk; the file can be moved away, a new one is made without a restart",
    "not a database": "the file is damaged: move it away, a new one is made without a restart",
    "malformed": "the file is damaged: move it away, a new one is made without a restart",
}


class StoreUnavailable(JoulegateError):
    """The store cannot be read or written now; `str()` is one line with the cure."""


class Database:
    """One database, opened when it is first needed, so that one that is down never keeps the proxy from serving.

    ValueError if the URL is none we can use; its text starts with the field's path.
    """

    def __init__(self, url: str) -> None:
        self.url = _parsed(url)
        self.engine = _engine(self.url)
        self._ready = False
        self._opening = threading.Lock()

    def open(self) -> Engine:
        """The engine of a database that has our schema; StoreUnavailable if there is none to be had."""
        path = self.path
        if path is not None and not path.exists():
            # Gone, or moved away by the operator: connections of the pool would go on writing into the old file.
            self.close()
        with self._opening:
            if not self._ready:
                self._prepare(path)
        return self.engine

    def close(self) -> None:
        self._ready = False
        self.engine.dispose()

    def _prepare(self, path: Path | None) -> None:
        try:
            _make_private(path)
            with self.engine.begin() as connection:
                migrate(connection)
        except (SQLAlchemyError, NewerSchema, OSError) as error:
            raise self.unavailable(error) from error
        self._ready = True

    @property
    def path(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(str(self.url.database)) if self.url.get_backend_name() == "sqlite" else None

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """Translate a driver's error, once; neither passwords nor parameters are in the text."""
        self.close()
        reason = error.orig if isinstance(error, DBAPIError) and error.orig else error
        text = " ".join(str(reason).split()) or type(reason).__name__
        where = self.url.render_as_string(hide_password=True)
        return StoreUnavailable(f"the store {where} cannot be used: {text}; {_cure(error, text)}")


def _parsed(url: str) -> URL:
    """The URL with our driver; the errors do not repeat it, since it may hold a password."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ValueError("store.url: should be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME") from error
    drivers = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
    name = parsed.drivername
    if name not in {*drivers, *drivers.values()}:
        raise ValueError(f"store.url: should begin with sqlite:/// or postgresql://, not {name}")
    file = parsed.database or ""
    if name == "sqlite" and (file in {"", ":memory:"} or file.startswith("file:")):
        raise ValueError("store.url: should name a file, such as sqlite:///joulegate.db")
    return parsed.set(drivername=drivers.get(name, name))


def _engine(url: URL) -> Engine:
    options: dict[str, Any] = {"hide_parameters": True}
    if url.get_backend_name() == "postgresql":
        options |= {"pool_pre_ping": True, "connect_args": {"connect_timeout": 3}}
    else:
        options |= {"connect_args": {"timeout": _LOCK_SECONDS}}
    try:
        engine = create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise ValueError(f"store.url: {error}; pip install 'joulegate[postgresql]'") from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _sqlite_connected)
        event.listen(engine, "begin", _sqlite_begins)
    return engine


def _sqlite_connected(connection: sqlite3.Connection, _record: object) -> None:
    """WAL, so that readers never wait for the writer; FULL, so that a commit survives a loss of power too."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _sqlite_begins(connection: Connection) -> None:
    """Our own BEGIN: the driver's comes too late for changes of the schema, which would then not roll back."""
    connection.exec_driver_sql("BEGIN")


def _make_private(path: Path | None) -> None:
    """Receipts tell who used what: a new file is the user's own (SQLite's side files take its mode)."""
    if path is not None and path.parent.is_dir():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _cure(error: Exception, text: str) -> str:
    if isinstance(error, NewerSchema):
        return "upgrade Joulegate, or give it a database of its own"
    if isinstance(error, OSError):
        return "give this user the right to write the file and its directory"
    lowered = text.lower()
    cures = (cure for sign, cure in _SQLITE_CURES.items() if sign in lowered)
    return next(cures, "check that the database is up, reachable and that the URL is right")
