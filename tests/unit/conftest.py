from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import app, run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def wrbench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """(exit status, stdout, stderr) of a command, in this process."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wrbench", *map(str, arguments)])
        capfd.readouterr()
        code = run(app)
        return code, *capfd.readouterr()

    return call
