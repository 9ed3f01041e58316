"""What stands behind the proxies: nginx with a static chat completion, and an asyncio server that streams chunks."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

COMPLETION = {
    "id": "chatcmpl-static",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "chat",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "All good things. " * 12}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 24, "completion_tokens": 48, "total_tokens": 72},
}
_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location /health {{ return 200 "ok"; }}
    location /v1/models {{ default_type application/json;
      return 200 '{{"object":"list","data":[{{"id":"chat","object":"model"}}]}}'; }}
    location / {{ default_type application/json; return 200 '{body}'; }}
  }}
}}
"""
_NGINX_PROXY = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream behind {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def static_upstream(port: int, cpu: int | None) -> Iterator[None]:
    """nginx that answers every chat request with the same completion."""
    with _nginx(_NGINX, cpu, port=port, body=json.dumps(COMPLETION)):
        yield


def nginx_proxy_configuration(folder: Path, port: int, upstream: int) -> Path:
    """A configuration of nginx as a plain proxy, the floor of what a proxy costs."""
    path = folder / "nginx.conf"
    path.write_text(_NGINX_PROXY.format(folder=folder, port=port, upstream=upstream))
    return path


@contextlib.contextmanager
def _nginx(template: str, cpu: int | None, **values: object) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "nginx.conf"
        configuration.write_text(template.format(folder=folder, **values))
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        process = subprocess.Popen([*pinned, nginx, "-c", str(configuration)], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)


class StreamingUpstream:
    """Streams `chunks` chunks of OpenAI's form with `pause` seconds between them, then usage and `[DONE]`."""

    def __init__(self, chunks: int, pause: float) -> None:
        head = {"id": "chatcmpl-s", "object": "chat.completion.chunk", "created": 1700000000, "model": "chat"}
        delta = {**head, "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}]}
        usage = {**head, "choices": [], "usage": COMPLETION["usage"]}
        self._chunk = _framed(f"data: {json.dumps(delta)}\n\n")
        self._end = _framed(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n") + b"0\r\n\r\n"
        self._chunks = chunks
        self._pause = pause

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=4096)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await _body(reader, head)
                streamed = b'"stream":true' in body.replace(b" ", b"")
                await (self._stream(writer) if streamed else self._whole(writer, head))
        writer.close()

    async def _whole(self, writer: asyncio.StreamWriter, head: bytes) -> None:
        models = b'{"object":"list","data":[{"id":"chat","object":"model"}]}'
        body = json.dumps(COMPLETION).encode() if head.startswith(b"POST") else models
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(self._chunks):
            writer.write(self._chunk)
            await asyncio.sleep(self._pause)
        writer.write(self._end)
        await writer.drain()


def _framed(text: str) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text.encode())


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") != b"chunked":
        return await reader.readexactly(int(fields.get(b"content-length", 0)))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body
