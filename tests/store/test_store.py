"""Receipts outlive the process, whatever happens to it and to the database."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from proxy.api.receipts import encode_receipt
from proxy.store.receipts import ReceiptStore, StoreUnavailable
from tests.receipts import example, receipt, receipt_object, unavailable
from tests.store.postgresql import postgresql_url

DEADLINE = 15.0


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each contract holds on both databases."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/joulegate.db"
    else:
        with postgresql_url() as url:
            yield url


@pytest.fixture
def store(url: str) -> Iterator[ReceiptStore]:
    with closing(ReceiptStore(url, encode_receipt)) as store:
        yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "joulegate.db"


def opened(file: Path, **options: float) -> ReceiptStore:
    return ReceiptStore(f"sqlite:///{file}", encode_receipt, flush_seconds=0.05, **options)  # type: ignore[arg-type]  # ints among them


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_what_was_put_can_be_read_at_once_and_after_a_restart(url: str) -> None:
    with closing(ReceiptStore(url, encode_receipt)) as store:
        store.put(example())
        at_once = store.get(example().request.id)
    with closing(ReceiptStore(url, encode_receipt)) as store:
        later = store.get(example().request.id)
    assert at_once == later
    assert later is not None
    assert json.loads(later.document) == receipt_object(example())


def test_the_settled_receipt_overwrites_the_provisional_one_and_never_the_other_way(store: ReceiptStore) -> None:
    for status in ("provisional", "settled", "provisional"):
        store.put(receipt("a", status=status, gpu=1 if status == "settled" else 2))
        assert store.flush()
    found = store.get("a")
    assert found is not None
    assert json.loads(found.document)["status"] == "settled"
    assert len(store.list().receipts) == 1


def test_the_same_holds_while_both_still_wait(store: ReceiptStore) -> None:
    store.put(receipt("a", status="settled"))
    store.put(receipt("a", status="provisional"))
    found = store.get("a")
    assert found is not None
    assert json.loads(found.document)["status"] == "settled"


def test_an_unknown_receipt_is_none(store: ReceiptStore) -> None:
    assert store.get("nobody") is None


def test_pages_are_newest_first_and_join_without_gap_or_repeat(store: ReceiptStore) -> None:
    # Three share an instant: the id decides among them.
    times = [5.0, 1.0, 3.0, 3.0, 3.0, 9.0, 7.0]
    for name, created in zip("abcdefg", times, strict=True):
        store.put(receipt(name, created=created))
    seen: list[str] = []
    page = store.list(limit=2)
    while page.has_more:
        seen += [row.id for row in page.receipts]
        page = store.list(limit=2, after=seen[-1])
    seen += [row.id for row in page.receipts]
    assert "".join(seen) == "fgaedcb"


def test_lists_can_be_narrowed(store: ReceiptStore) -> None:
    store.put(receipt("a", created=10.0, model="chat", task="chat", key="ann"))
    store.put(receipt("b", created=20.0, model="painter", task="image", key="ann"))
    store.put(receipt("c", created=30.0, model="chat", task="chat", key="bob", status="provisional"))

    def ids(**narrow: str | float) -> set[str]:
        return {row.id for row in store.list(**narrow).receipts}  # type: ignore[arg-type]  # each test names its own

    assert ids(model="chat") == {"a", "c"}
    assert ids(task="image") == {"b"}
    assert ids(key="ann") == {"a", "b"}
    assert ids(status="provisional") == {"c"}
    assert ids(since=20.0) == {"b", "c"}
    assert ids(until=20.0) == {"a"}
    assert ids(key="ann", model="chat") == {"a"}
    assert [row.key for row in store.list(limit=1).receipts] == ["bob"]


def test_bad_pages_are_refused(store: ReceiptStore) -> None:
    for limit in (0, -1, 1001):
        with pytest.raises(ValueError, match="limit: should be from 1 to 1000"):
            store.list(limit=limit)
    with pytest.raises(ValueError, match="after: there is no receipt 'nobody'"):
        store.list(after="nobody")


def test_columns_hold_what_one_would_ask_for(file: Path) -> None:
    with closing(opened(file)) as store:
        store.put(example())
        store.put(unavailable())
    with closing(sqlite3.connect(file)) as database:
        columns = "model, task, endpoint, energy_microjoules, grams_co2e, prompt_tokens, completion_tokens, status"
        rows = database.execute(f"SELECT {columns} FROM receipts").fetchall()
    assert rows == [("chat", "chat", "/v1/chat/completions", None, None, 12, 40, "unavailable")]


def test_many_threads_lose_nothing(store: ReceiptStore) -> None:
    def put(thread: int) -> None:
        for number in range(200):
            store.put(receipt(f"{thread}-{number}"))

    threads = [threading.Thread(target=put, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list(limit=1000).receipts) == 800
    assert store.health().dropped == 0


CRASH = """
import os, sys, time
from proxy.api.receipts import encode_receipt
from proxy.store.receipts import ReceiptStore
from tests.receipts import receipt
store = ReceiptStore(sys.argv[1], encode_receipt)
number = 0
while True:
    store.put(receipt(str(number)))
    # One write call per line: the reader sees whole numbers, each only after its receipt was put.
    os.write(1, f"{number} {time.monotonic()}\\n".encode())
    number += 1
    time.sleep(0.002)
"""


def test_kill_9_loses_at_most_the_last_second(file: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, f"sqlite:///{file}"], stdout=subprocess.PIPE, cwd=os.getcwd(), text=True
    )
    assert process.stdout is not None
    puts: list[float] = []
    while not puts or puts[-1] - puts[0] < 2.5:
        puts.append(float(process.stdout.readline().split()[1]))
    process.send_signal(signal.SIGKILL)
    puts += [float(line.split()[1]) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()
    with closing(opened(file)) as store:
        kept = [number for number in range(len(puts)) if store.get(str(number)) is not None]
    assert kept == list(range(len(kept)))
    lost = puts[len(kept) :]
    assert kept
    # The promise is one second; the other is for a machine that is busy with other tests.
    assert not lost or puts[-1] - lost[0] <= 2.0


def test_a_clean_close_writes_what_waits(file: Path) -> None:
    store = ReceiptStore(f"sqlite:///{file}", encode_receipt, flush_seconds=1000.0)
    store.put(receipt("a"))
    store.close()
    with closing(opened(file)) as store:
        assert store.get("a") is not None


def test_a_store_that_cannot_be_opened_is_retried_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "later"
    with closing(opened(directory / "joulegate.db")) as store:
        store.put(receipt("a"))
        eventually(lambda: not store.health().up)
        assert store.get("a") is not None, "what waits is still told"
        with pytest.raises(StoreUnavailable, match="check that its directory exists"):
            store.list()
        directory.mkdir()
        eventually(lambda: store.health().up and store.health().waiting == 0)
        assert [row.id for row in store.list().receipts] == ["a"]
    assert "check that its directory exists" in caplog.text
    assert "The store can be written again" in caplog.text


def test_a_damaged_file_moved_away_is_made_anew(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_bytes(b"this is no database at all\n" * 1000)
    with closing(opened(file)) as store:
        store.put(receipt("a"))
        eventually(lambda: not store.health().up)
        assert "the file is damaged: move it away" in (store.health().error or "")
        file.rename(file.with_suffix(".damaged"))
        eventually(lambda: store.health().up)
        assert store.get("a") is not None
    assert "the file is damaged: move it away" in caplog.text


def test_a_file_that_vanishes_is_made_anew(file: Path) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("a"))
        assert store.flush()
        for path in file.parent.glob("joulegate.db*"):
            path.unlink()
        store.put(receipt("b"))
        assert store.flush()
    with closing(opened(file)) as store:
        assert store.get("b") is not None


def test_a_locked_database_delays_and_loses_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("a"))
        assert store.flush()
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            store.put(receipt("b"))
            eventually(lambda: not store.health().up)
            assert store.get("a") is not None, "readers do not wait for the lock"
            other.execute("ROLLBACK")
        eventually(lambda: store.health().waiting == 0)
        assert store.get("b") is not None
    assert "another process holds a lock" in caplog.text


def test_the_queue_is_bounded_and_what_is_dropped_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(opened(tmp_path / "missing" / "joulegate.db", capacity=10)) as store:
        for number in range(50):
            store.put(receipt(str(number)))
        store.put(receipt("0", gpu=7))
        health = store.health()
        # A batch in flight goes back into the queue, beyond its capacity by one batch at most.
        assert 10 <= health.waiting <= 20
        assert health.waiting + health.dropped == 50
    assert "Receipts are dropped" in caplog.text
    assert "were not written when the store closed" in caplog.text


def test_a_row_the_database_refuses_does_not_hold_up_the_others(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("good"))
        store.put(receipt("bad", model="\ud800"))
        store.put(receipt("fine"))
        eventually(lambda: store.health().dropped == 1)
        assert {row.id for row in store.list().receipts} == {"good", "fine"}
    assert "Receipt bad is dropped" in caplog.text


def test_a_newer_schema_is_left_alone(file: Path) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("a"))
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE joulegate_schema SET version = 99")
        database.commit()
    with closing(opened(file)) as store, pytest.raises(StoreUnavailable, match="version 99.*upgrade Joulegate"):
        store.get("a")


def test_the_file_is_its_owners_alone(file: Path) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("a"))
        assert store.flush()
        modes = {path.stat().st_mode & 0o777 for path in file.parent.glob("joulegate.db*")}
    assert modes == {0o600}


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nonsense", r"sqlite:///FILE or postgresql://"),
        ("mysql://root:secret@host/db", "should begin with"),
        ("sqlite://", "should name a file"),
        ("sqlite:///:memory:", "should name a file"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_it(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^store\.url: .*{complaint}") as refused:
        ReceiptStore(url, encode_receipt)
    assert "secret" not in str(refused.value)


def test_neither_passwords_nor_receipts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'joulegate[postgresql]')")
    with caplog.at_level(logging.DEBUG):
        url = "postgresql://someone:hunter2@127.0.0.1:1/joulegate"
        with closing(ReceiptStore(url, encode_receipt, flush_seconds=0.01)) as store:
            store.put(receipt("a", model="my-secret-model"))
            eventually(lambda: not store.health().up)
    assert "check that the database is up" in caplog.text
    assert "hunter2" not in caplog.text
    assert "my-secret-model" not in caplog.text


def test_a_database_of_the_first_version_is_read_on_and_loses_its_wide_index(file: Path) -> None:
    with closing(opened(file)) as store:
        store.put(receipt("new"))
        assert store.flush()
    with closing(sqlite3.connect(file)) as database:
        database.execute("DROP INDEX receipts_of_key")
        database.execute("CREATE INDEX receipts_key_created ON receipts (key, created, id)")
        database.execute("UPDATE joulegate_schema SET version = 1")
        whole = encode_receipt(receipt("old")).decode()
        database.execute("UPDATE receipts SET id = 'old', document = ?", (whole,))
        database.commit()
    with closing(opened(file)) as store:
        found = store.get("old")
        assert found is not None
        assert found.document.decode() == whole
    with closing(sqlite3.connect(file)) as database:
        names = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert "receipts_of_key" in names
    assert "receipts_key_created" not in names
