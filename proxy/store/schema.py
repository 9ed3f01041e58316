"""The tables, and how a database of an older version becomes one of today's.

A migration is a function over a connection; the version is the number of migrations a database has seen. They run in
one transaction with the change of the version, so a database is never between two of them.
"""

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)

from proxy.errors import JoulegateError

metadata = MetaData()

version_table = Table("joulegate_schema", metadata, Column("version", Integer, nullable=False))

_HAS_KEY = text("key IS NOT NULL")

#: The columns are what one would ask for, `document` is JSON with what else the `energy` object says. `created` is Unix
#: time. Requests without a key, often all of them, are not in the index by key.
receipts = Table(
    "receipts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created", Float(53), nullable=False),
    Column("model", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("key", Text),
    Column("client_request_id", Text),
    Column("status", String(16), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("method", String(32)),
    Column("energy_microjoules", BigInteger),
    Column("grams_co2e", Float(53)),
    Column("duration_seconds", Float(53), nullable=False),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("document", Text, nullable=False),
    Index("receipts_created", "created", "id"),
    Index("receipts_model_created", "model", "created", "id"),
    Index("receipts_of_key", "key", "created", "id", sqlite_where=_HAS_KEY, postgresql_where=_HAS_KEY),
)


class NewerSchema(JoulegateError):
    """The database was written by a later version than this one knows."""


def _receipts_table(connection: Connection) -> None:
    receipts.create(connection, checkfirst=True)


def _smaller_key_index(connection: Connection) -> None:
    connection.execute(text("DROP INDEX IF EXISTS receipts_key_created"))
    for index in receipts.indexes:
        index.create(connection, checkfirst=True)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_receipts_table, _smaller_key_index)


def migrate(connection: Connection) -> None:
    """Bring a database, empty or old, to the present version; NewerSchema if it is beyond it."""
    version = schema_version(connection)
    if version > len(MIGRATIONS):
        raise NewerSchema(f"the database has schema version {version}, this Joulegate knows {len(MIGRATIONS)}")
    for migration in MIGRATIONS[version:]:
        migration(connection)
    if version < len(MIGRATIONS):
        connection.execute(update(version_table).values(version=len(MIGRATIONS)))


def schema_version(connection: Connection) -> int:
    """0 for a database that has nothing of ours yet (it gets its version table here)."""
    if not inspect(connection).has_table(version_table.name):
        version_table.create(connection)
        connection.execute(insert(version_table).values(version=0))
    version: int = connection.execute(select(version_table.c.version)).scalar_one()
    return version
