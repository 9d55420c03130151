"""Checkpoints: complete or absent, checked by hash, by parameter name, free of the world size.

    checkpoints/step-N-attempt-K/model.pt  optimizer-RANK.pt ...  manifest.json

N is the number of steps done. Each rank writes the optimizer state it owns; the folder takes its name, by one atomic
rename, when every file is on disk and the manifest names them all with their SHA-256. Tensors are read with
weights_only=True.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.config import BadInput
from harness.dist import Ranks
from harness.store import TrialFolder, write_atomically

_NAME = re.compile(r"step-(\d+)-attempt-(\d+)")
VERSION = 1


class Superseded(RuntimeError):
    """A newer attempt of the same trial has started: this one stops and commits nothing."""


@dataclass(frozen=True)
class Saved:
    """One committed checkpoint."""

    path: Path
    step: int
    attempt: int
    manifest: dict[str, Any]

    def load(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        return state

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """{parameter name: {state key: tensor}} of all ranks that wrote it."""
        merged: dict[str, dict[str, Any]] = {}
        for name in sorted(n for n in self.manifest["files"] if n.startswith("optimizer-")):
            merged.update(self.load(name))
        return merged


def save(
    folder: TrialFolder, ranks: Ranks, trial_id: str, attempt: int, step: int, files: Mapping[str, dict[str, Any]], extra: dict[str, Any]
) -> Path:
    """Writes this rank's `files` ({file name: state}) and commits the checkpoint. Collective.

    Raises Superseded on every rank when a newer attempt exists; nothing is committed then.
    """
    final = folder.checkpoints / f"step-{step}-attempt-{attempt}"
    partial = folder.checkpoints / f".{final.name}"
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    written = {name: _write(partial / name, state) for name, state in files.items()}
    gathered = ranks.gathered(written)
    superseded = False
    if ranks.rank == 0:
        manifest = {
            "version": VERSION, "trial_id": trial_id, "step": step, "attempt": attempt, "world_size": ranks.world_size,
            "files": {name: entry for part in gathered for name, entry in part.items()}, **extra,
        }  # fmt: skip
        write_atomically(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        superseded = folder.newest_attempt() > attempt
        if not superseded:
            _commit(partial, final)
    if ranks.from_rank_0(superseded):
        raise Superseded(f"trial {trial_id}: attempt {attempt} stops at step {step}, since a newer attempt has started")
    return final


def _write(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    with open(path, "w+b") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _commit(partial: Path, final: Path) -> None:
    if final.exists():  # the same attempt saved this step before: a stop right after a scheduled save
        shutil.rmtree(partial)
        return
    partial.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def found(folder: TrialFolder) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of the committed checkpoints, newest first."""
    named = ((_NAME.fullmatch(p.name), p) for p in folder.checkpoints.glob("step-*"))
    return sorted(((int(m[1]), int(m[2]), p) for m, p in named if m), reverse=True)


def newest(folder: TrialFolder, trial_id: str) -> tuple[Saved | None, list[str]]:
    """(the newest checkpoint whose every byte is as written, a warning for each damaged one passed over).

    Raises BadInput for a checkpoint of another trial.
    """
    complaints: list[str] = []
    for step, attempt, path in found(folder):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            damaged = next(_damage(path, manifest), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged = f"manifest.json: {error}"
        if damaged:
            complaints.append(f"checkpoint {path.name} is damaged ({damaged}); an older one is used")
            continue
        if manifest["trial_id"] != trial_id:
            raise BadInput(f"{path}: is a checkpoint of trial {manifest['trial_id']}, not of {trial_id}")
        return Saved(path, step, attempt, manifest), complaints
    return None, complaints


def at(path: Path) -> Saved:
    """A checkpoint that `newest` has checked, as another rank reads it."""
    manifest = json.loads((path / "manifest.json").read_text())
    return Saved(path, manifest["step"], manifest["attempt"], manifest)


def _damage(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["version"] != VERSION:
        yield f"version {manifest['version']} is not {VERSION}"
    for name, entry in manifest["files"].items():
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                yield f"{name}: its bytes have changed"


def tidy(folder: TrialFolder, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what unfinished saves left behind. For rank 0, between saves."""
    for _, _, path in found(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, shape and fp32 bytes of the full state in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
