"""What runs: the commit and the code snapshot that a trial's record names, and versions of packages. No torch here."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata

from harness.config import CONFIGS

ROOT = CONFIGS.parent
"""of the running code: a checkout, or a snapshot in a store"""


def code() -> dict[str, str | None]:
    """`commit`, and `code`: the snapshot of the submission; None for what there is none of.

    A snapshot says itself which commit it was taken of: it may lie in the checkout of something else.
    """
    try:
        snapshot = json.loads((ROOT / "snapshot.json").read_text())
    except FileNotFoundError:
        return {"commit": _commit(), "code": None}
    return {"commit": snapshot["commit"], "code": snapshot["code"]}


def _commit() -> str | None:
    """The commit of a checkout, marked when the working tree differs; None outside of one."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def version(package: str) -> str | None:
    """Of an installed package, which is not imported; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
