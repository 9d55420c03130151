"""A real MLflow server for tests, and a relay before it that sees, holds up or refuses requests."""

from __future__ import annotations

import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import tracking

UI = "import sys; from pathlib import Path; from harness.store import Store; from harness import tracking; tracking.open_ui(Store(Path(sys.argv[1])), int(sys.argv[2]))"

ROOT = Path(__file__).resolve().parents[1]

os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


def empty_database(folder: Path) -> Path:
    """MLflow's database without experiments: seconds to make, so made once and copied."""
    tracking._client(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


class Server:
    """`wrbench ui` on a store of its own, which is an MLflow server like any other."""

    def __init__(self, root: Path, empty_database: Path | None = None) -> None:
        """empty_database: to begin with, see `empty_database`."""
        self.root = root
        self.database, self.log = root / "mlflow.db", root / "server.log"
        if empty_database is not None:
            shutil.copy(empty_database, self.database)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self, wait: bool = True) -> None:
        """Unless it runs. Returns when it answers; wait=False: at once."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        with self._lock, open(self.log, "a") as log:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", UI, str(self.root), str(self.port)],
                    cwd=self.root, env=environment | {"PYTHONPATH": str(ROOT)},
                    start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
        deadline = time.monotonic() + 300
        while wait and not self.answers():
            assert time.monotonic() < deadline, "the MLflow server does not answer"
            time.sleep(0.05)

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "the MLflow server has ended"
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """To all its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Whatever it is doing; it can be started again."""
        with self._lock:
            self.signal(signal.SIGKILL)
            if self.process is not None:
                self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


Answer = tuple[int, dict[str, str], bytes]


class Relay:
    """Passes requests on to a server, while it is open. `before` sees each first, and may answer it itself.

    When it is closed, or the server dies of a request, the connection ends without an answer.
    """

    def __init__(self, server_url: str, before: Callable[[BaseHTTPRequestHandler], Answer | None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    status, headers, content = before(self) or passed_on(self, body)
                except (OSError, http.client.HTTPException):
                    self.close_connection = True
                    return
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        def passed_on(request: BaseHTTPRequestHandler, body: bytes) -> Answer:
            headers = {key: value for key, value in request.headers.items() if key in ("Content-Type", "Authorization")}
            sent = urllib.request.Request(server_url + request.path, body or None, headers, method=request.command)
            try:
                with urllib.request.urlopen(sent, timeout=60) as got:
                    return got.status, {"Content-Type": got.headers.get("Content-Type", "")}, got.read()
            except urllib.error.HTTPError as refusal:
                return refusal.code, {"Content-Type": refusal.headers.get("Content-Type", "")}, refusal.read()

        self._handler = Handler
        self._http: ThreadingHTTPServer | None = None
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        if self._http is None:
            self._http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
            threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        self._http = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    """Not one that the kernel gives to connections: a server that is killed and started again must find its own still free."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
