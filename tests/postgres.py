"""A real PostgreSQL for tests: a cluster of its own in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.mlflow_server import _free_port

USER, PASSWORD = "wrbench", "s3cret"


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian does not put it into the PATH."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((folder for folder in found if (folder / "initdb").exists()), None)


class Postgres:
    """A server that is empty at first, on a port of this machine, with a password."""

    def __init__(self, folder: Path) -> None:
        """folder: of its programs"""
        self._programs = folder
        self.root = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = _free_port()
        self.url = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        # it refuses to run as root
        self._as: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}

    def __enter__(self) -> Self:
        secret, data = self.root / "password", self.root / "data"
        secret.write_text(PASSWORD)
        if self._as:
            for path in (self.root, secret):
                shutil.chown(path, self._as["user"])
        made = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}", "--encoding=UTF8", "--no-sync"]
        subprocess.run([self._programs / "initdb", "-D", data, *made], check=True, stdout=subprocess.DEVNULL, cwd=self.root, **self._as)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", self.root, "-p", str(self.port)]
        with open(self.root / "log", "w") as log:
            command = [self._programs / "postgres", "-D", data, *settings]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root, start_new_session=True, **self._as)
        deadline = time.monotonic() + 60
        while "ready to accept connections" not in (said := (self.root / "log").read_text()):
            assert self._process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGINT)  # at once, and in order
        self._process.wait(60)
        shutil.rmtree(self.root)
