import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.meter.processes import PROXY, ProcessTable

ME = os.getpid()


class Proc:
    """A /proc of our making: processes with a parent and CPU ticks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def cpu(self, user: int, *, idle: int = 0, iowait: int = 0, steal: int = 0, irq: int = 0) -> None:
        (self.root / "stat").write_text(f"cpu  {user} 0 0 {idle} {iowait} {irq} 0 {steal} 0 0\ncpu0 1 1 1\n")

    def process(self, pid: int, parent: int, ticks: int, *, of_children: int = 0, command: str = "python") -> None:
        (self.root / str(pid)).mkdir(exist_ok=True)
        fields = ["S", str(parent), *["0"] * 9, str(ticks), "0", str(of_children), "0", "20", "0"]
        (self.root / str(pid) / "stat").write_text(f"{pid} ({command}) {' '.join(fields)}")

    def end(self, pid: int) -> None:
        (self.root / str(pid) / "stat").unlink()
        (self.root / str(pid)).rmdir()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "proc")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def table_of(proc: Proc, clock: Clock) -> ProcessTable:
    return ProcessTable(proc.root, clock)


def test_busy_time_is_divided_among_our_backends_and_others(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    ours = {PROXY: [10], "chat": [20], "painter": [30]}
    proc.cpu(1000, idle=5000)
    for pid, parent in ((1, 0), (10, 1), (20, 10), (30, 10), (99, 1)):
        proc.process(pid, parent, 100)
    table.refresh(ours)
    assert table.shares() is None
    proc.cpu(1100, idle=99000, iowait=77, steal=500)
    proc.process(10, 1, 105)
    proc.process(20, 10, 140)
    proc.process(30, 10, 125)
    proc.process(99, 1, 130)
    shares = table.shares()
    assert shares is not None
    assert shares.backends == {PROXY: 0.05, "chat": 0.4, "painter": 0.25}
    assert shares.foreign == pytest.approx(0.3)


def test_a_backends_time_is_that_of_its_whole_tree(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(0)
    proc.process(20, 1, 0)
    proc.process(21, 20, 0, command="worker (1) of ) 2")
    proc.process(22, 21, 0)
    table.refresh({"chat": [20]})
    assert set(table.pids) == {20, 21, 22}
    table.shares()
    proc.cpu(100)
    proc.process(21, 20, 30)
    proc.process(22, 21, 50)
    shares = table.shares()
    assert shares is not None
    assert shares.backends["chat"] == pytest.approx(0.8)


def test_a_child_that_ended_is_counted_once(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(0)
    proc.process(20, 1, 0)
    proc.process(21, 20, 40)
    table.refresh({"chat": [20]})
    table.shares()
    proc.cpu(100)
    proc.end(21)
    proc.process(20, 1, 0, of_children=50)  # 40 of them were counted before
    shares = table.shares()
    assert shares is not None
    assert shares.backends["chat"] == pytest.approx(0.1)


def test_a_backend_that_ends_is_not_counted_to_the_proxy(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    ours = {PROXY: [10], "chat": [20]}
    proc.cpu(0)
    proc.process(10, 1, 0)
    proc.process(20, 10, 4000)
    table.refresh(ours)
    table.shares()
    proc.cpu(100)
    proc.end(20)
    proc.process(10, 1, 1, of_children=4000)
    table.refresh({PROXY: [10], "chat": []})
    shares = table.shares()
    assert shares is not None
    assert shares.backends[PROXY] == pytest.approx(0.01)
    assert shares.foreign == pytest.approx(0.99)


def test_a_backend_that_joins_brings_no_time_from_before(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(0)
    proc.process(10, 1, 0)
    table.refresh({PROXY: [10]})
    table.shares()
    proc.process(50, 1, 9000)
    proc.cpu(100)
    table.refresh({PROXY: [10], "elsewhere": [50]})
    shares = table.shares()
    assert shares is not None
    assert shares.backends["elsewhere"] == 0
    assert shares.foreign == 1


def test_an_idle_host_is_nobodys(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(10, idle=0)
    proc.process(10, 1, 5)
    table.refresh({PROXY: [10]})
    table.shares()
    proc.cpu(10, idle=100)
    shares = table.shares()
    assert shares is not None
    assert (shares.foreign, shares.backends) == (0, {PROXY: 0})


def test_ticks_that_do_not_fit_never_make_shares_above_one(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(0)
    proc.process(10, 1, 0)
    table.refresh({PROXY: [10]})
    table.shares()
    proc.cpu(2)
    proc.process(10, 1, 3)
    shares = table.shares()
    assert shares is not None
    assert (shares.foreign, shares.backends) == (0, {PROXY: 1})


def test_the_whole_table_is_walked_again_only_when_due_or_when_our_processes_change(proc: Proc, clock: Clock) -> None:
    table = table_of(proc, clock)
    proc.cpu(0)
    proc.process(20, 1, 0)
    table.refresh({"chat": [20]})
    proc.process(21, 20, 0)
    table.refresh({"chat": [20]})
    assert set(table.pids) == {20}
    clock.now += 10
    table.refresh({"chat": [20]})
    assert set(table.pids) == {20, 21}
    proc.process(30, 1, 0)
    table.refresh({"chat": [20], "painter": [30]})
    assert set(table.pids) == {20, 21, 30}


def test_without_proc_there_are_no_shares(tmp_path: Path, clock: Clock) -> None:
    table = ProcessTable(tmp_path / "absent", clock)
    table.refresh({PROXY: [1]})
    assert table.shares() is None
    assert table.shares() is None


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child burns CPU time."""
    burn = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", burn], start_new_session=True) as process:
        yield process
        os.killpg(process.pid, 9)


def test_a_real_process_tree_is_found_and_priced(child: subprocess.Popen[bytes]) -> None:
    hours = itertools.count()
    table = ProcessTable(clock=lambda: 3600.0 * next(hours))  # always due: the child's child may be younger than a walk
    ours = {PROXY: [ME], "burner": [child.pid]}
    burnt = 0.0
    for _ in range(2_000):
        table.refresh(ours)
        shares = table.shares()
        if shares is not None:
            assert 0 <= shares.foreign <= 1
            total = shares.foreign + sum(shares.backends.values())
            assert total == pytest.approx(1) or total == 0
            burnt += shares.backends["burner"]
        if burnt > 0.5:
            break
        sum(range(100_000))
    assert burnt > 0.5
