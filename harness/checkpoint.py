"""Checkpoints: complete or absent, checked by hash, by parameter name, free of backend and world size.

    checkpoints/step-N-attempt-K/model.pt  optimizer-RANK.pt ...  manifest.json

N is the number of steps done. `model.pt` is the full state, name -> tensor. An optimizer file holds the state that its
rank owns, {parameter name: {"start": int, key: tensor, ...}}: a 1-d tensor is the piece [start, start + numel) of that
state of the flattened (C order) parameter, a 0-d tensor is whole. The pieces of all ranks tile each parameter.

The weights of cycle ends are kept for good as weights/step-N.pt, a second name of that checkpoint's model.pt.

`Saving` writes in the background. The folder takes its name, by one atomic rename, when every file is on disk and the
manifest names them all with their SHA-256. Tensors are read with weights_only=True.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from harness.config import BadInput
from harness.dist import Ranks
from harness.journal import Journal
from harness.store import TrialFolder, sync_names, write_atomically

_NAME = re.compile(r"step-(\d+)-attempt-(\d+)")
_FILE = re.compile(r"model\.pt|optimizer-\d+\.pt")
VERSION = 2


class Superseded(RuntimeError):
    """A newer attempt of the same trial has started: this one stops and commits nothing."""


def superseded(trial_id: str, attempt: int, step: int) -> Superseded:
    return Superseded(f"trial {trial_id}: attempt {attempt} stops at step {step}, since a newer attempt has started")


@dataclass(frozen=True)
class Saved:
    """One committed checkpoint."""

    path: Path
    step: int
    attempt: int
    manifest: dict[str, Any]

    def load(self, name: str, device: str = "cpu") -> dict[str, Any]:
        """One file's state. On the device "meta" no data are read."""
        state: dict[str, Any] = torch.load(self.path / name, map_location=device, weights_only=True)
        return state

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """{parameter name: {state key: tensor}}, merged from the pieces of all ranks.

        1-d tensors are the state of the whole flattened parameter, 0-d tensors are as each piece had them. Raises
        ValueError, with the parameter's name, where the pieces do not tile it or disagree on a 0-d tensor.
        """
        pieces: dict[str, list[dict[str, Any]]] = {}
        for file in self.manifest["files"]:
            if file.startswith("optimizer-"):
                for name, piece in self.load(file).items():
                    pieces.setdefault(name, []).append(piece)
        weights = self.load("model.pt", "meta")
        return {name: _merged(name, found, weights[name].numel()) for name, found in pieces.items()}


def _merged(parameter: str, pieces: list[dict[str, Any]], elements: int) -> dict[str, Tensor]:
    """The state of a parameter of so many elements."""
    pieces = sorted(pieces, key=lambda piece: int(piece["start"]))
    merged: dict[str, Tensor] = {}
    for key in sorted({key for piece in pieces for key in piece} - {"start"}):
        parts: list[tuple[int, Tensor]] = [(piece["start"], piece[key]) for piece in pieces if key in piece]
        if parts[0][1].ndim == 0:
            if any(not torch.equal(part, parts[0][1]) for _, part in parts):
                values = [part.tolist() for _, part in parts]
                raise ValueError(f"optimizer state {key} of {parameter}: {values} in its pieces, not one value")
            merged[key] = parts[0][1]
            continue
        end = 0
        for start, part in parts:
            if start != end:
                raise ValueError(f"optimizer state {key} of {parameter}: a piece starts at {start}, where the one before ends at {end}")
            end += part.numel()
        if end != elements:
            raise ValueError(f"optimizer state {key} of {parameter}: its pieces end at {end} of {elements} elements")
        merged[key] = torch.cat([part for _, part in parts])
    return merged


class Saving:
    """One checkpoint on its way to disk, while training goes on.

    Construction copies `files` ({file name: state}, this rank's live tensors) to CPU memory and starts a thread that
    writes, syncs and hashes them; on every rank, `commit` then makes the checkpoint of all of them. No thread is
    collective.
    """

    def __init__(
        self,
        folder: TrialFolder,
        ranks: Ranks,
        trial_id: str,
        attempt: int,
        step: int,
        files: Mapping[str, dict[str, Any]],
        extra: dict[str, Any],
    ) -> None:
        self._folder, self._ranks, self._attempt = folder, ranks, attempt
        self._final = folder.checkpoints / f"step-{step}-attempt-{attempt}"
        self._partial = folder.checkpoints / f".{self._final.name}"
        self._head = {
            "version": VERSION, "trial_id": trial_id, "step": step, "attempt": attempt, "world_size": ranks.world_size, **extra,
        }  # fmt: skip
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, Any]] = thread.submit(_write, self._partial, _copy(files))
        thread.shutdown(wait=False)

    def written(self) -> bool:
        """Whether this rank's files are on disk, or have failed: `commit` will not wait for them."""
        return self._writing.done()

    def commit(self, journal: Journal) -> str | None:
        """Waits for every rank's files and commits, after rank 0's journal is on disk. Collective.

        What went wrong, the same on every rank, if the operating system could not write something (a full disk): nothing
        is left of the checkpoint then. Raises Superseded on every rank when a newer attempt exists.
        """
        files: dict[str, Any] = {}
        failure: str | None = None
        try:
            files = self._writing.result()
        except OSError as error:
            failure = f"rank {self._ranks.rank}: {_told(error)}"
        parts = self._ranks.gathered((files, failure))
        outdated = False
        if self._ranks.rank == 0:
            failure = "; ".join(failed for _, failed in parts if failed) or None
            outdated = self._folder.is_superseded(self._attempt)
            if not failure and not outdated:
                try:
                    journal.sync()
                    self._commit({name: entry for files, _ in parts for name, entry in files.items()})
                    outdated = self._folder.is_superseded(self._attempt)
                    if outdated:
                        # The newer attempt may have chosen its checkpoint before this one got its name, and then counts none
                        # of this one's later steps: an attempt after it that resumed from here would leave a gap in the metrics.
                        self._final.rename(self._partial)
                except OSError as error:
                    failure = _told(error)
            if failure or outdated:
                shutil.rmtree(self._partial, ignore_errors=True)
        outdated, failure = self._ranks.from_rank_0((outdated, failure))
        if outdated:
            raise superseded(self._head["trial_id"], self._attempt, self._head["step"])
        return failure

    def _commit(self, files: dict[str, Any]) -> None:
        write_atomically(self._partial / "manifest.json", _manifest(self._head | {"files": files}))
        sync_names(self._partial)
        self._partial.rename(self._final)
        sync_names(self._final.parent)

    def abandon(self) -> None:
        """Waits for the thread and leaves the checkpoint. For an attempt that fails; not collective."""
        wait([self._writing])
        if self._ranks.rank == 0:  # another rank cannot know that rank 0 is not committing just now
            shutil.rmtree(self._partial, ignore_errors=True)


def _copy(state: Any) -> Any:
    """The nested mapping with every tensor copied to CPU memory of its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copy(value) for key, value in state.items()}
    return state


def _write(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Writes and syncs {file name: state}; {file name: {bytes, sha256}}. Of files of which one fails none is left."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    try:
        for name, state in files.items():
            with open(folder / name, "wb") as file:
                hashed = _Hashed(file)
                torch.save(state, cast(BinaryIO, hashed))
                if hashed.error is not None:
                    raise hashed.error
                file.flush()
                os.fsync(file.fileno())
                entries[name] = {"bytes": file.tell(), "sha256": hashed.sha256.hexdigest()}
    except OSError as error:
        for begun in files:
            (folder / begun).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, name) from None
    return entries


class _Hashed:
    """A file for torch.save, which hashes what should be in it, not what can be read back.

    An error is kept, and nothing written after it: torch.save would make a RuntimeError of its own out of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self.sha256.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None: ...


def _told(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _manifest(content: dict[str, Any]) -> str:
    """The text of manifest.json: the content and its own hash."""
    return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest; OSError or ValueError, saying what is wrong, if it is not as written."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError("is not a mapping")
    if manifest.get("version") != VERSION:
        raise ValueError(f"version {manifest.get('version')} is not {VERSION}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("its content has changed")
    for name in manifest["files"]:
        if not _FILE.fullmatch(name):
            raise ValueError(f"lists {name!r}, which is no file of a checkpoint")
    return manifest


def found(folder: TrialFolder) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of the committed checkpoints, newest first.

    A later attempt descends from a checkpoint that was sound then: its own stand before any of an earlier attempt, which may be
    damaged at a higher step.
    """
    named = ((_NAME.fullmatch(p.name), p) for p in folder.checkpoints.glob("step-*"))
    return sorted(((int(m[1]), int(m[2]), p) for m, p in named if m), key=lambda c: (c[1], c[0]), reverse=True)


def newest(folder: TrialFolder, trial_id: str, reached: Mapping[int, int] | None = None) -> tuple[Saved | None, list[str]]:
    """(the newest checkpoint whose every byte is as written, a warning for each one passed over).

    reached: of each attempt, steps that the journal has. It is on disk before a checkpoint is committed, so one beyond it stands
    beside a journal that was cut, or is an older copy: resuming from it would lose those metrics for good. None: not asked.
    Raises BadInput for a checkpoint of another trial.
    """
    complaints: list[str] = []
    for step, attempt, path in found(folder):
        if reached is not None and reached.get(attempt, 0) < step:
            has = f"{folder.journal.name} ends at step {reached.get(attempt, 0)} of attempt {attempt}"
            complaints.append(f"checkpoint {path.name} is passed over: {has}, cut, or an older copy; what it lacks is trained again")
            continue
        try:
            manifest = _read_manifest(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            complaints.append(f"checkpoint {path.name} is damaged and passed over (manifest.json: {what})")
            continue
        if damaged := next(_damage(path, manifest["files"]), None):
            complaints.append(f"checkpoint {path.name} is damaged and passed over ({damaged})")
            continue
        if manifest["trial_id"] != trial_id:
            raise BadInput(f"{path}: is a checkpoint of trial {manifest['trial_id']}, not of {trial_id}")
        return Saved(path, step, attempt, manifest), complaints
    return None, complaints


def at(path: Path) -> Saved:
    """A checkpoint that `newest` has checked, as another rank reads it."""
    manifest = _read_manifest(path)
    return Saved(path, manifest["step"], manifest["attempt"], manifest)


def _damage(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, entry in files.items():
        try:
            with open(path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    yield f"{name}: {size} bytes, not {entry['bytes']}"
                elif hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    yield f"{name}: its bytes have changed"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def tidy(folder: TrialFolder, keep: int, attempt: int, weights_of: Collection[int] = ()) -> list[str]:
    """Removes all but the newest `keep` checkpoints, and what attempts before this one left unfinished. For rank 0.

    Of checkpoints of the steps `weights_of` the weights are kept for good, before the checkpoint goes; one whose weights
    cannot be kept (a full disk) stays, with a warning.
    """
    complaints: list[str] = []
    kept: set[int] = set()
    for place, (step, _, path) in enumerate(found(folder)):
        if step in weights_of and step not in kept:  # the newest of this step: an older one may be damaged
            try:
                _keep_weights(path, folder.weights / f"step-{step}.pt")
            except OSError as error:
                complaints.append(f"the weights of step {step} could not be kept ({_told(error)}); they stay in {path.name}")
                continue
            kept.add(step)
        if place >= keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.checkpoints.glob(".step-*"):
        if (name := _NAME.fullmatch(path.name[1:])) and int(name[2]) < attempt:  # this attempt's may be being written
            shutil.rmtree(path, ignore_errors=True)
    return complaints


def _keep_weights(checkpoint: Path, kept: Path) -> None:
    """Gives a checkpoint's model.pt a second name, by which it outlives the checkpoint; complete or absent, without new bytes.

    A copy where the file system knows no second names. A checkpoint that is half removed has given its weights already.
    """
    model = checkpoint / "model.pt"
    if not model.exists() or (kept.exists() and _age(kept) == _age(model)):
        return
    kept.parent.mkdir(exist_ok=True)
    partial = kept.with_name(f".{kept.name}")
    try:
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(model)
        except OSError:
            shutil.copy2(model, partial)
            sync_names(partial)
        partial.replace(kept)
        sync_names(kept.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _age(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def non_finite(values: Mapping[str, Tensor | float]) -> str | None:
    """The name of the first that is, or holds, NaN or an infinity."""
    return next((name for name, value in values.items() if not torch.isfinite(torch.as_tensor(value)).all()), None)


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, shape and fp32 bytes of the full state in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
