"""A real PostgreSQL server for one test run: made in a temporary directory, reached over its Unix socket."""

import atexit
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import pytest


@contextmanager
def postgresql_url() -> Iterator[str]:
    """The URL of a new, empty database; skips where there is no server to start."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'joulegate[postgresql]')")
    sockets = _server()
    name = f"test_{uuid.uuid4().hex}"
    with closing(psycopg.connect(host=sockets, user="joulegate", dbname="postgres", autocommit=True)) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql://joulegate@/{name}?host={sockets}"


@cache
def _server() -> str:
    """Start the server once; it ends with the tests."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    user = _other_user()
    home = Path(tempfile.mkdtemp(prefix="joulegate-pg-"))
    if user is not None:
        shutil.chown(home, user)

    def run(program: str, *arguments: str) -> None:
        # It refuses to run as root: there Debian's own user for it steps in.
        subprocess.run([programs / program, *arguments], check=True, user=user, cwd=home, stdout=subprocess.DEVNULL)

    data = str(home / "data")
    run("initdb", "-D", data, "-U", "joulegate", "-A", "trust", "--no-sync", "-E", "UTF8")
    options = f"-c listen_addresses='' -c unix_socket_directories={home} -c fsync=off"
    run("pg_ctl", "-D", data, "-o", options, "-l", str(home / "log"), "-w", "start")

    def stop() -> None:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(home, ignore_errors=True)

    atexit.register(stop)
    return str(home)


def _programs() -> Path | None:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = installed[-1] if installed else shutil.which("initdb")
    return Path(found).parent if found else None


def _other_user() -> str | None:
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("PostgreSQL refuses to run as root and there is no user postgres")
