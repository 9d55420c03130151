"""Checkpoints: true copies, complete or absent, damage of any kind found, pieces merged whatever the world size was."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import checkpoint
from harness.checkpoint import Saved, Saving
from harness.config import BadInput
from harness.dist import Ranks
from harness.journal import Journal
from harness.store import TrialFolder
from tests.disk import no_room_beyond

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
SHAPES = {"conv.weight": (4, 3, 3, 3), "norm.weight": (7,), "scalar": ()}


def files(seed: int, world_size: int = 2) -> dict[str, dict[str, Any]]:
    """A model, and Adam's state of its parameters laid end to end and cut in `world_size` parts at random places."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    model = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    out: dict[str, dict[str, Any]] = {"model.pt": {**model, "norm.running_mean": torch.randn(7, generator=generator)}}
    moments = {name: torch.randn(2, weight.numel(), generator=generator) for name, weight in model.items()}
    end = sum(weight.numel() for weight in model.values())
    cuts = [0, *sorted(rng.randrange(end + 1) for _ in range(world_size - 1)), end]
    for rank in range(world_size):
        first = 0
        for name, both in moments.items():
            start, stop = (min(max(cut - first, 0), both.shape[1]) for cut in cuts[rank : rank + 2])
            if start < stop:
                piece = {"start": start, "step": torch.tensor(9.0), "exp_avg": both[0, start:stop], "exp_avg_sq": both[1, start:stop]}
                out.setdefault(f"optimizer-{rank}.pt", {})[name] = piece
            first += both.shape[1]
    return out


def begin(folder: TrialFolder, step: int, state: dict[str, dict[str, Any]], attempt: int = 1, **extra: Any) -> Saving:
    return Saving(folder, ALONE, "abc", attempt, step, state, extra)


def save(folder: TrialFolder, step: int, attempt: int = 1, **extra: Any) -> str | None:
    journal = Journal(folder.journal, "abc", attempt)
    failure = begin(folder, step, files(step), attempt, **extra).commit(journal)
    journal.close()
    return failure


def names(folder: TrialFolder) -> list[str]:
    return sorted(p.name for p in folder.checkpoints.iterdir())


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_equal(value, b[key])
        elif isinstance(value, Tensor):
            assert value.dtype == b[key].dtype
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    assert checkpoint.newest(folder, "abc") == (None, [])
    assert save(folder, 3, progress={"answer": {"anytime/val_top1": 0.1 + 0.2}}) is None
    assert save(folder, 5) is None
    saved, complaints = checkpoint.newest(folder, "abc")
    assert saved is not None
    assert complaints == []
    assert (saved.step, saved.attempt, saved.manifest["world_size"]) == (5, 1, 1)
    for name, state in files(5).items():
        assert_equal(saved.load(name), state)
    assert saved == checkpoint.at(saved.path)
    assert checkpoint.at(tmp_path / "checkpoints/step-3-attempt-1").manifest["progress"] == {"answer": {"anytime/val_top1": 0.1 + 0.2}}
    assert names(folder) == ["step-3-attempt-1", "step-5-attempt-1"]


def test_the_snapshot_is_a_copy_and_writing_does_not_hold_up_the_caller(tmp_path: Path) -> None:
    """The disk is a pipe that nobody reads until every tensor has been overwritten."""
    folder = TrialFolder(tmp_path)
    partial = folder.checkpoints / ".step-3-attempt-1"
    partial.mkdir(parents=True)
    os.mkfifo(partial / "model.pt")
    large = torch.arange(100.0)
    live = {
        "weight": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "buffer": torch.tensor(7), "view": large[10:20], "parameter": torch.nn.Parameter(torch.ones(3)), "transposed": torch.ones(2, 3).T,
    }  # fmt: skip
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    saving = begin(folder, 3, {"model.pt": live})
    with torch.no_grad():
        for tensor in live.values():
            tensor.fill_(-1)
    assert not saving.written()
    written = (partial / "model.pt").read_bytes()
    assert_equal(torch.load(io.BytesIO(written), weights_only=True), before)
    assert len(written) < 4000, "a view is saved without what it is a view of"
    journal = Journal(folder.journal, "abc", 1)
    assert saving.commit(journal) == "rank 0: model.pt: Invalid argument", "a pipe cannot be synced, and what cannot be synced is not saved"
    assert saving.written()
    assert names(folder) == []


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_state_is_the_same_whatever_the_world_size(tmp_path: Path, world_size: int) -> None:
    whole = files(1, world_size=1)["optimizer-0.pt"]
    folder = TrialFolder(tmp_path)
    begin(folder, 1, files(1, world_size)).commit(Journal(folder.journal, "abc", 1))
    saved, _ = checkpoint.newest(folder, "abc")
    assert saved is not None
    merged = saved.optimizer_state()
    assert_equal({name: {"start": 0, **state} for name, state in merged.items()}, whole)


def adam(start: int, stop: int, step: float = 9.0) -> dict[str, Any]:
    return {"start": start, "step": torch.tensor(step), "exp_avg": torch.arange(float(start), float(stop))}


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([adam(0, 5), adam(6, 10)], "exp_avg of w: a piece starts at 6, where the one before ends at 5"),
        ([adam(0, 5), adam(4, 10)], "exp_avg of w: a piece starts at 4, where the one before ends at 5"),
        ([adam(0, 10), adam(0, 10)], "exp_avg of w: a piece starts at 0, where the one before ends at 10"),
        ([adam(1, 10)], "exp_avg of w: a piece starts at 1, where the one before ends at 0"),
        ([adam(0, 5), adam(5, 9)], "exp_avg of w: its pieces end at 9 of 10 elements"),
        ([adam(0, 5), adam(5, 12)], "exp_avg of w: its pieces end at 12 of 10 elements"),
        ([adam(0, 5), adam(5, 10, step=8.0)], r"step of w: \[9.0, 8.0\] in its pieces, not one value"),
    ],
)
def test_pieces_that_do_not_tile_a_parameter_are_refused(tmp_path: Path, pieces: list[dict[str, Any]], complaint: str) -> None:
    folder = TrialFolder(tmp_path)
    state = {f"optimizer-{rank}.pt": {"w": piece} for rank, piece in enumerate(pieces)}
    begin(folder, 1, {"model.pt": {"w": torch.zeros(2, 5)}, **state}).commit(Journal(folder.journal, "abc", 1))
    saved, _ = checkpoint.newest(folder, "abc")
    assert saved is not None
    with pytest.raises(ValueError, match=complaint):
        saved.optimizer_state()


# -------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def two(tmp_path: Path) -> TrialFolder:
    """Two checkpoints, of steps 3 and 7."""
    folder = TrialFolder(tmp_path / "trial")
    assert save(folder, 3, progress={"steps_done": 3, "train_seconds": 0.12345, "answer": {}}) is None
    assert save(folder, 7, progress={"steps_done": 7, "train_seconds": 1.23456, "answer": {"anytime/val_top1": 0.25}}) is None
    return folder


def _sound(folder: TrialFolder) -> tuple[Saved, list[str]]:
    saved, complaints = checkpoint.newest(folder, "abc")
    assert saved is not None
    for name, state in files(saved.step).items():
        assert_equal(saved.load(name), state)
    return saved, complaints


def test_a_bit_flipped_anywhere_is_found_and_the_checkpoint_before_is_used(two: TrialFolder) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the flips: {seed}")
    rng = random.Random(seed)
    whole, _ = _sound(two)
    assert whole.step == 7
    assert {p.name for p in whole.path.iterdir()} == {"model.pt", "optimizer-0.pt", "optimizer-1.pt", "manifest.json"}
    for path in sorted(whole.path.iterdir()):
        content = path.read_bytes()
        for _ in range(100):
            place, bit = rng.randrange(len(content)), rng.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            saved, complaints = _sound(two)
            if saved.step == 7:  # e.g. a blank between two entries that has become another
                assert path.name == "manifest.json"
                assert saved.manifest == whole.manifest
            else:
                assert saved.step == 3
                assert len(complaints) == 1
                assert f"step-7-attempt-1 is damaged and passed over ({path.name}" in complaints[0]
        path.write_bytes(content)


def test_a_truncated_empty_or_missing_file_is_found_and_the_checkpoint_before_is_used(two: TrialFolder) -> None:
    whole, _ = _sound(two)
    for path in sorted(whole.path.iterdir()):
        content = path.read_bytes()
        for size in (*range(0, len(content) - 1, 97), len(content) - 2):  # without its last byte the manifest says the same
            path.write_bytes(content[:size])
            saved, complaints = _sound(two)
            assert (saved.step, len(complaints)) == (3, 1)
            assert f"({path.name}" in complaints[0]
        path.unlink()
        saved, complaints = _sound(two)
        assert saved.step == 3
        assert complaints == [f"checkpoint step-7-attempt-1 is damaged and passed over ({path.name}: No such file or directory)"]
        path.write_bytes(content)
    assert _sound(two)[0].step == 7


def _resealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], str]:
    """A manifest that was changed and then given the right hash: made so, not damaged."""

    def text(manifest: dict[str, Any]) -> str:
        change(manifest)
        return checkpoint._manifest(manifest)

    return text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (lambda manifest: checkpoint._manifest(manifest)[:300], "manifest.json: "),
        (lambda manifest: "[1, 2]", "manifest.json: is not a mapping"),
        (lambda manifest: "", "manifest.json: "),
        (lambda manifest: "{}", "manifest.json: version None is not 2"),
        (lambda manifest: json.dumps(manifest), "manifest.json: its content has changed"),
        (_resealed(lambda m: m.update(version=1)), "manifest.json: version 1 is not 2"),
        (
            _resealed(lambda m: m["files"].update({"../step-3-attempt-1/model.pt": m["files"]["model.pt"]})),
            "manifest.json: lists '../step-3",
        ),
        (_resealed(lambda m: m["files"].update({"/etc/hosts": m["files"]["model.pt"]})), "manifest.json: lists '/etc/hosts'"),
        (_resealed(lambda m: m.pop("files")), "manifest.json: "),
    ],
)
def test_a_manifest_that_is_not_one_is_passed_over(two: TrialFolder, text: Callable[[dict[str, Any]], str], complaint: str) -> None:
    newest, _ = _sound(two)
    (newest.path / "manifest.json").write_text(text(newest.manifest))
    saved, complaints = _sound(two)
    assert (saved.step, len(complaints)) == (3, 1)
    assert complaint in complaints[0]


def test_when_every_checkpoint_is_damaged_there_is_none_and_each_is_named(two: TrialFolder) -> None:
    for path in two.checkpoints.iterdir():
        (path / "optimizer-1.pt").unlink()
    saved, complaints = checkpoint.newest(two, "abc")
    assert saved is None
    assert [c.split()[1] for c in complaints] == ["step-7-attempt-1", "step-3-attempt-1"]


def test_a_checkpoint_of_another_trial_is_refused_with_both_ids(two: TrialFolder) -> None:
    with pytest.raises(BadInput, match=r"step-7-attempt-1: is a checkpoint of trial abc, not of xyz"):
        checkpoint.newest(two, "xyz")


# --------------------------------------------------------------------------------------------- no room on the disk


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_without_room_the_checkpoint_is_absent_and_the_older_one_stays(two: TrialFolder, room: int) -> None:
    """The limit is met at once, in a small write, or at the end of the first file."""
    with no_room_beyond(room):
        assert save(two, 9) == "rank 0: model.pt: File too large"
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"]
    assert _sound(two)[0].step == 7
    assert save(two, 9) is None, "there is room again"
    assert _sound(two)[0].step == 9


def test_the_disk_is_full_at_the_second_file_or_at_the_manifest(two: TrialFolder) -> None:
    large = files(9) | {"optimizer-1.pt": {"w": {"start": 0, "exp_avg": torch.zeros(5000)}}}
    journal = Journal(two.journal, "abc", 1)
    with no_room_beyond(10_000):
        assert begin(two, 9, large).commit(journal) == "rank 0: optimizer-1.pt: File too large"
        assert "File too large" in str(save(two, 9, progress={"answer": {f"m/{i}": 0.5 for i in range(1000)}}))
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"]
    assert _sound(two)[0].step == 7


def test_a_checkpoint_is_not_committed_before_the_journal_up_to_it_is_on_disk(two: TrialFolder) -> None:
    journal = Journal(two.journal, "abc", 1)
    while two.journal.stat().st_size < 10_000:
        journal.write(8, event="warning", message="x" * 100)
    with no_room_beyond(10_000):
        journal.write(8, metrics={"train/loss": 1.0})
        assert f"{two.journal}: File too large: 1 line(s) wait to be written" == begin(two, 9, files(9)).commit(journal)
    assert _sound(two)[0].step == 7
    assert begin(two, 9, files(9)).commit(journal) is None
    assert _sound(two)[0].step == 9
    assert b'"train/loss":1.0' in two.journal.read_bytes()


# ---------------------------------------------------------------------------------------------------------- tidying


def test_tidying_keeps_the_newest_and_what_is_being_written(two: TrialFolder) -> None:
    for name in (".step-8-attempt-1", ".step-9-attempt-2", ".step-9-attempt-3", ".step-x", "notes"):
        (two.checkpoints / name).mkdir()
    checkpoint.tidy(two, keep=1, attempt=2)
    assert names(two) == [".step-9-attempt-2", ".step-9-attempt-3", ".step-x", "notes", "step-7-attempt-1"]


def inode(path: Path) -> int:
    return path.stat().st_ino


def kept(folder: TrialFolder) -> list[str]:
    return sorted(p.name for p in folder.weights.glob("*")) + sorted(p.name for p in folder.weights.glob(".*"))


def test_the_weights_of_the_steps_asked_for_outlive_their_checkpoint(two: TrialFolder) -> None:
    assert save(two, 9) is None
    assert checkpoint.tidy(two, keep=1, attempt=2, weights_of={3, 9, 100}) == []
    assert names(two) == ["step-9-attempt-1"]
    assert kept(two) == ["step-3.pt", "step-9.pt"]
    for step in (3, 9):
        assert_equal(torch.load(two.weights / f"step-{step}.pt", weights_only=True), files(step)["model.pt"])
    assert inode(two.weights / "step-9.pt") == inode(two.checkpoints / "step-9-attempt-1/model.pt"), "no byte is there twice"


def test_the_weights_of_a_step_are_those_of_the_newest_attempt_that_reached_it(two: TrialFolder) -> None:
    checkpoint.tidy(two, keep=2, attempt=1, weights_of={7})
    begin(two, 7, files(99), attempt=2).commit(Journal(two.journal, "abc", 2))
    for keep in (3, 2, 1, 1):
        checkpoint.tidy(two, keep=keep, attempt=2, weights_of={7})
        assert_equal(torch.load(two.weights / "step-7.pt", weights_only=True), files(99)["model.pt"])
    assert names(two) == ["step-7-attempt-2"]
    assert kept(two) == ["step-7.pt"]


def test_where_files_have_one_name_only_weights_are_copied_once(two: TrialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a file system answers is all that is made up."""

    def refused(*arguments: object, **more: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with no_room_beyond(100):
        complaints = checkpoint.tidy(two, keep=1, attempt=1, weights_of={3})
    (complaint,) = complaints
    assert re.fullmatch(r"the weights of step 3 could not be kept \(.*: File too large\); they stay in step-3-attempt-1", complaint)
    assert kept(two) == []
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"], "a checkpoint does not go before its weights are kept"
    assert checkpoint.tidy(two, keep=1, attempt=1, weights_of={3, 7}) == []
    assert names(two) == ["step-7-attempt-1"]
    for step in (3, 7):
        assert_equal(torch.load(two.weights / f"step-{step}.pt", weights_only=True), files(step)["model.pt"])
    first = inode(two.weights / "step-7.pt")
    assert first != inode(two.checkpoints / "step-7-attempt-1/model.pt")
    checkpoint.tidy(two, keep=1, attempt=1, weights_of={3, 7})
    assert inode(two.weights / "step-7.pt") == first


def test_a_checkpoint_stays_while_its_weights_cannot_be_kept(two: TrialFolder) -> None:
    two.weights.write_text("a file where the folder should be")
    (complaint,) = checkpoint.tidy(two, keep=1, attempt=1, weights_of={3})
    assert "the weights of step 3 could not be kept" in complaint
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"]
    two.weights.unlink()
    assert checkpoint.tidy(two, keep=1, attempt=1, weights_of={3}) == []
    assert (names(two), kept(two)) == (["step-7-attempt-1"], ["step-3.pt"])


def test_an_abandoned_checkpoint_leaves_nothing(two: TrialFolder) -> None:
    begin(two, 9, files(9)).abandon()
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"]


def test_a_newer_attempt_forbids_the_commit(two: TrialFolder) -> None:
    shutil.copytree(two.path, copy := two.path.with_name("copy"))
    for claims, refused in ((1, False), (2, True)):
        folder = two if claims == 1 else TrialFolder(copy)
        for _ in range(claims):
            folder.claim()
        saving = begin(folder, 9, files(9))
        if refused:
            with pytest.raises(checkpoint.Superseded, match="trial abc: attempt 1 stops at step 9"):
                saving.commit(Journal(folder.journal, "abc", 1))
        else:
            assert saving.commit(Journal(folder.journal, "abc", 1)) is None
        assert names(folder) == ["step-3-attempt-1", "step-7-attempt-1", *([] if refused else ["step-9-attempt-1"])]


class _Overtaken(Saving):
    """A newer attempt is claimed between the last look before the checkpoint gets its name and the first one after it."""

    def _commit(self, files: dict[str, Any]) -> None:
        super()._commit(files)
        self._folder.claim()


def test_a_checkpoint_that_got_its_name_after_a_newer_attempt_began_is_taken_back(two: TrialFolder) -> None:
    assert two.claim() == 1
    saving = _Overtaken(two, ALONE, "abc", 1, 9, files(9), {})
    with pytest.raises(checkpoint.Superseded, match="trial abc: attempt 1 stops at step 9"):
        saving.commit(Journal(two.journal, "abc", 1))
    assert names(two) == ["step-3-attempt-1", "step-7-attempt-1"]


def test_non_finite() -> None:
    assert checkpoint.non_finite({"a": 1.0, "w": torch.ones(3), "count": torch.tensor(7)}) is None
    assert checkpoint.non_finite({"a": 1.0, "w": torch.tensor([1.0, float("nan")])}) == "w"
    assert checkpoint.non_finite({"a": float("inf"), "w": torch.ones(3)}) == "a"
