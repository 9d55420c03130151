"""A web server with ranges that drops and stalls connections, as the internet does."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, faults: Faults, *args: object) -> None:
        self.folder, self.faults = folder, faults
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, status = file.read_bytes(), 200
        size = len(content)
        first, last = 0, size - 1
        if wanted := self.headers.get("Range"):
            first, last = (int(n) if n else size - 1 for n in wanted.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
        fault = self.faults.draw() if body else None
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("Connection", "close")  # or a server that was stopped would go on answering
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if not body:
            return
        if fault is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "stall":
            time.sleep(self.faults.stall_seconds)

    def log_message(self, *args: object) -> None: ...


class Faults:
    def __init__(self, seed: int, drop: float, stall: float, stall_seconds: float) -> None:
        self._random, self._drop, self._stall, self.stall_seconds = random.Random(seed), drop, stall, stall_seconds
        self._lock = threading.Lock()
        self.made: list[str] = []

    def draw(self) -> str | None:
        with self._lock:
            x = self._random.random()
            fault = "drop" if x < self._drop else "stall" if x < self._drop + self._stall else None
            if fault:
                self.made.append(fault)
            return fault


@contextmanager
def serving(folder: Path, seed: int = 0, drop: float = 0.0, stall: float = 0.0, stall_seconds: float = 2.0) -> Iterator[tuple[str, Faults]]:
    """(address, the faults made so far) of a server of a folder's files."""
    faults = Faults(seed, drop, stall, stall_seconds)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, faults))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
