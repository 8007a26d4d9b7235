"""A small Hugging Face hub on 127.0.0.1: creates repositories and receives commits, with LFS for weights."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Receives uploads of huggingface_hub.

    Attributes:
        repositories: The bodies of the requests that created repositories.
        files: The received files by path.
        tokens: The credentials of all requests.
        fails_at: Requests whose path contains this text are answered with an error.
    """

    def __init__(self) -> None:
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.fails_at: str | None = None
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                hub.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body, path = _body(request), request.path
        if any(part in path for part in ("/api/repos/", "/preupload/", "/info/lfs/", "/commit/")):
            self.tokens.add(request.headers.get("Authorization"))
        status, found = (403, {"error": "not allowed here"}) if self.fails_at and self.fails_at in path else (200, {})
        if status == 200:
            found = self._reply(request.command, path, body)
        payload = json.dumps(found).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(payload)))
        request.end_headers()
        request.wfile.write(payload)

    def _reply(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            name = "/".join(n for n in (self.repositories[-1]["organization"], self.repositories[-1]["name"]) if n)
            return {"url": f"{self.url}/{name}", "name": name}
        if "/preupload/" in path:
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    {**o, "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ],
            }
        if method == "PUT" and path.startswith("/upload/"):
            self._large[path.rpartition("/")[2]] = body
            return {}
        if "/commit/" in path:
            for line in body.splitlines():
                self._commit(json.loads(line))
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""}
        return {"id": "x", "sha": "0" * 40, "private": False, "siblings": []}

    def _commit(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.files[value["path"]] = self._large[value["oid"]]


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)
