"""The code of the moment of submission, kept in the store: jobs run it, whatever is edited later.

    runs/STUDY/code/HASH/{harness,launch,analysis,configs}/  snapshot.json  uncommitted.diff

HASH is over paths and bytes, so that an unchanged working tree is kept once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from harness import provenance
from harness.provenance import ROOT

PARTS = {"harness": ("*.py", "*.so"), "launch": ("*.py",), "analysis": ("*.py", "*.html"), "configs": ("*.yaml",)}
"""folder -> what of it runs"""


def take(study: Path) -> Path:
    """The folder of the snapshot of the running code; made unless it is there, complete or absent."""
    files = sorted(path for part, patterns in PARTS.items() for pattern in patterns for path in (ROOT / part).rglob(pattern))
    contents = {str(path.relative_to(ROOT)): path.read_bytes() for path in files}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    code = digest.hexdigest()[:12]
    final = study / "code" / code
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{code}.") as temporary:
        made = Path(temporary) / code
        for name, content in contents.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
        described = {"code": code, "commit": provenance.code()["commit"], "time": datetime.now(UTC).isoformat(timespec="seconds")}
        (made / "snapshot.json").write_text(json.dumps(described, indent=1) + "\n")
        (made / "uncommitted.diff").write_bytes(_uncommitted())
        try:
            made.rename(final)
        except OSError:  # somebody else's, made this moment
            if not final.exists():
                raise
    return final


def _uncommitted() -> bytes:
    """What differs from the commit, files that git does not know yet included."""
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *PARTS).split(b"\0")[:-1]
    files = (_git("diff", "--no-color", "--no-index", "--", "/dev/null", os.fsdecode(name)) for name in new)
    return _git("diff", "--no-color", "HEAD", "--", *PARTS) + b"".join(files)


def _git(*arguments: str) -> bytes:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return b""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, timeout=60).stdout


def environment(code: Path) -> dict[str, str]:
    """Under which Python runs the code of a snapshot and no other: neither the working directory's nor the installed one."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{code}{os.pathsep}{path}" if path else str(code), "PYTHONSAFEPATH": "1"}


def exports(code: Path) -> list[str]:
    """The same as lines of a script, whose own PYTHONPATH comes second."""
    return [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
