"""An engine whose kind reports steps, but which says that it cannot: it is served all the same."""

from pathlib import Path

from tests.e2e.harness import running, until


def test_an_engine_that_cannot_tell_its_steps_is_accounted_by_tokens(tmp_path: Path) -> None:
    backend = {"kind": "vllm", "model": "fake", "devices": [0], "args": {"unable": "its scheduler has no schedule()"}}
    with running(tmp_path, models=[{"name": "chat", "backend": backend}]) as proxy:
        until(lambda: not proxy.node.registry.states["chat"].reports_steps)
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi [[tokens=20 token_ms=10]]"}]}
        answer = proxy.post("/v1/chat/completions", body)
        assert answer.headers["X-Energy-Method"] == "measured-tokens"
        receipt = proxy.receipt(answer.headers["X-Request-Id"])
        assert receipt["method"] == "measured-tokens"
        assert receipt["energy_joules"] > 0
