"""A server that somebody else runs: any OpenAI-compatible URL. Nothing is started, its health is watched.

`url` is its address, with or without `/v1`. A client's own credentials never reach it; if it wants a key, name the
variable of the proxy's environment that holds it: `api_key_env: ELSEWHERE_KEY`. It is sent as `Authorization: Bearer`.
A vLLM on this host that runs with our step reporter names the socket it reports to in `steps`; any other server's
requests are accounted by what the relay observes (`measured-tokens`).
"""

from dataclasses import dataclass
from pathlib import Path

from backends.spec import BackendError, BackendSpec, Launch, Task


@dataclass(frozen=True)
class RemoteKind:
    tasks: tuple[Task, ...] = ("chat", "classification", "image", "embedding", "score", "audio")
    reports_steps: bool = False

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch | None:
        """Nothing to start. Raises BackendError without an http(s) URL."""
        if not (spec.url or "").startswith(("http://", "https://")):
            raise BackendError(f"{spec.name}: a remote backend needs url: http://… or https://…, not {spec.url!r}")
        return None


KIND = RemoteKind()
