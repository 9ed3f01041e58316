"""What of a changed configuration a running node can take on, and that one reload follows the other."""

import asyncio
import logging
from typing import Any

import pytest

from proxy.config import Config, parse
from proxy.errors import ConfigError
from proxy.reload import Reloads, compare

CHAT = {"name": "chat", "backend": {"kind": "remote", "url": "http://127.0.0.1:1"}}


def config(*models: dict[str, Any], **sections: Any) -> Config:
    return parse({"models": list(models) or [CHAT], **sections}, source="test")


def test_nothing_changed_is_nothing_to_do() -> None:
    found = compare(config(), config())
    assert (found.changed, found.restart, found.config) == ((), (), config())


def test_what_new_requests_can_go_by_changes_at_once() -> None:
    key = {"name": "ann", "sha256": "0" * 64}
    wanted = config(
        {**CHAT, "aliases": ["gpt"], "max_in_flight": 2},
        server={"allowed_hosts": ["x"], "cors_origins": ["http://x"], "max_body_bytes": 2048, "drain_seconds": 1},
        auth={"required": True, "keys": [key]},
        energy={"boundary": "facility", "pue": 1.5, "carbon": {"source": "static", "grams_per_kwh": 56}},
    )
    found = compare(config(), wanted)
    assert found.config == wanted
    assert found.restart == ()
    assert {*found.changed} == {
        *("server.allowed_hosts", "server.cors_origins", "server.max_body_bytes", "server.drain_seconds"),
        *("auth.required", "auth.keys", "energy.boundary", "energy.pue", "energy.carbon"),
        *("models[0].aliases", "models[0].max_in_flight"),
    }


def test_what_holds_for_life_stays_and_is_named_each_time() -> None:
    wanted = config(
        server={"port": 9, "host": "::1", "metrics": False},
        store={"url": "sqlite:///other.db"},
        energy={"sample_hz": 5, "meters": {"rapl": False}},
    )
    found = compare(config(), wanted)
    assert found.changed == ("server.metrics",)
    assert found.restart == ("server.host", "server.port", "store.url", "energy.sample_hz", "energy.meters")
    assert found.config == config(server={"metrics": False})
    assert compare(found.config, wanted).restart == found.restart


def test_what_serves_a_model_is_not_a_matter_of_fields() -> None:
    other = {"name": "chat", "replicas": [CHAT["backend"], CHAT["backend"]]}
    assert compare(config(), config(other, {**CHAT, "name": "more"})).changed == ()


class Node:
    """Takes configurations on, slowly; `read` gives the next of `files`."""

    def __init__(self, *files: Config | ConfigError) -> None:
        self.files = list(files)
        self.taken: list[Config] = []
        self.go_on = asyncio.Event()

    def read(self) -> Config:
        found = self.files.pop(0)
        if isinstance(found, ConfigError):
            raise found
        return found

    async def take_on(self, wanted: Config) -> None:
        self.taken.append(wanted)
        await self.go_on.wait()


async def soon(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - a thread's doing is no event of ours
            await asyncio.sleep(0.005)


@pytest.fixture
async def node() -> Node:
    return Node()


async def test_asked_for_during_a_reload_there_is_one_more_of_the_newest_file(node: Node) -> None:
    first, newest = config(), config(server={"drain_seconds": 1})
    node.files = [first, newest]
    reloads = Reloads(node.read, node.take_on)
    running = asyncio.create_task(reloads.run())
    reloads.ask()
    await soon(lambda: node.taken == [first])
    for _ in range(3):
        reloads.ask()
    await asyncio.sleep(0.05)
    assert node.taken == [first]
    node.go_on.set()
    await soon(lambda: node.taken == [first, newest])
    await asyncio.sleep(0.05)
    assert node.files == []
    running.cancel()


async def test_a_file_that_cannot_be_used_is_one_line_and_the_next_is_read(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.files = [ConfigError("x.yaml: server.prot: there is no such field"), config()]
    node.go_on.set()
    reloads = Reloads(node.read, node.take_on)
    running = asyncio.create_task(reloads.run())
    reloads.ask()
    await soon(lambda: caplog.records)
    assert node.taken == []
    assert "x.yaml: server.prot: there is no such field" in caplog.records[0].getMessage()
    reloads.ask()
    await soon(lambda: node.taken)
    running.cancel()


async def test_without_a_file_it_says_so(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Reloads(None, node.take_on).ask()
    assert "nothing to reload" in caplog.text
