"""An S3 server for tests (moto), and a proxy in front of it that injects faults."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from harness import free_port


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to a server, and answers some of them with an error, late, or not at all.

    Args:
        port: port of the server.
        seed: seed of the faults.
    """

    daemon_threads = True

    def __init__(self, port: int, seed: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self._random, self._lock = port, random.Random(seed), threading.Lock()
        self.share = 0.0
        """Share of the requests that have a fault."""
        self.down = False
        """Whether every connection is closed without an answer, as by a server that was killed."""
        self.faults: dict[str, int] = {}

    def fault(self) -> str | None:
        """Returns the fault of the next request: "down", "500", "503", "slow", "cut" (after the headers), or None."""
        with self._lock:
            kind = self._random.choice(["500", "503", "slow", "cut"])
            found = "down" if self.down else kind if self._random.random() < self.share else None
            if found is not None:
                self.faults[found] = self.faults.get(found, 0) + 1
            return found

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed closes its connections: not an error of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        """Reads the body of the request, which may be sent in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # the trailer
            pass
        return b"".join(parts)

    def _forward(self) -> None:
        fault = self.server.fault()
        body = self._body()
        if fault == "down":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "slow":
            time.sleep(0.5)
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut" and len(content) > 1:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.command != "HEAD":
            self.wfile.write(content)
        upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward


@contextmanager
def s3_server(folder: Path, seed: int = 0) -> Iterator[FaultyProxy]:
    """Yields a proxy in front of an S3 server that has the bucket `bucket`. Both end with the context."""
    port = free_port()
    with open(folder / "moto.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        limit = time.monotonic() + 60
        while True:
            try:
                make = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.urlopen(make, timeout=10).close()
                break
            except OSError:
                assert time.monotonic() < limit, (folder / "moto.log").read_text()
                time.sleep(0.1)
        proxy = FaultyProxy(port, seed)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()
    finally:
        process.terminate()
        process.wait(30)


def environment_of(proxy: FaultyProxy) -> dict[str, str]:
    """Returns the environment variables with which a process uses the server behind a proxy."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
