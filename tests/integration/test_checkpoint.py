"""Saving while the process is killed, the disk is slow or full, on one rank or on all."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import checkpoint, dist, journal
from harness.checkpoint import Saving
from harness.dist import joined
from harness.journal import Journal
from harness.store import Store, TrialFolder
from harness.train import train
from tests.disk import no_room_beyond
from tests.integration.ranks import Ranks, history
from tests.integration.test_train import ADAMW, SGDW, small

_server = multiprocessing.get_context("forkserver")  # preloaded by tests.integration.ranks
SAVES = {3, 7, 9, 14, 21}
"""steps done at the saves of the small trial"""


def events(folder: TrialFolder, event: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(folder.journal) if line.get("event") == event]


# --------------------------------------------------------------------------------------------------------- kills


def _state(step: int) -> dict[str, dict[str, Any]]:
    return {
        "model.pt": {f"weight.{i}": torch.full((20_000,), float(step)) for i in range(4)},
        "optimizer-0.pt": {f"weight.{i}": {"start": 0, "exp_avg": torch.full((20_000,), float(step))} for i in range(4)},
    }


CYCLE_ENDS = range(0, 100_000, 5)


def _save_for_ever(path: Path, committed: Connection) -> None:
    folder, alone = TrialFolder(path), dist.Ranks(0, 0, 1, torch.device("cpu"))
    attempt = folder.claim()
    checkpoint.tidy(folder, 2, attempt, CYCLE_ENDS)
    saved, _ = checkpoint.newest(folder, "abc")
    book = Journal(folder.journal, "abc", attempt)
    step = saved.step if saved else 0
    while True:
        step += 1
        assert Saving(folder, alone, "abc", attempt, step, _state(step), {}).commit(book) is None
        committed.send(step)
        checkpoint.tidy(folder, 2, attempt, CYCLE_ENDS)


def _received(connection: Connection) -> Iterator[int]:
    try:
        while True:
            yield connection.recv()
    except EOFError:
        return


def test_kill_9_at_any_moment_of_saving_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    folder = TrialFolder(tmp_path)
    last = interrupted = 0
    for _ in range(25):
        receiver, sender = _server.Pipe(duplex=False)
        child = _server.Process(target=_save_for_ever, args=(tmp_path, sender), daemon=True)
        child.start()
        sender.close()
        first = receiver.recv()
        assert first == last + 1, "it went on where the last one was"
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        last = max([first, *_received(receiver)])
        interrupted += bool(list(folder.checkpoints.glob(".step-*")))
        saved, complaints = checkpoint.newest(folder, "abc")
        assert saved is not None
        assert complaints == [], "a checkpoint has its name only when it is whole"
        assert saved.step in (last, last + 1), "or it was killed between the commit and its message"
        last = saved.step
        for name, state in _state(last).items():
            assert all(
                torch.equal(v["exp_avg"] if isinstance(v, dict) else v, torch.full((20_000,), float(last)))
                for v in saved.load(name).values()
            )
            assert saved.load(name).keys() == state.keys()
    assert interrupted, "some of the kills came while files were being written"
    checkpoint.tidy(folder, 2, folder.claim(), CYCLE_ENDS)  # as the next attempt begins
    assert {p.name for p in folder.weights.glob("step-*")} == {f"step-{step}.pt" for step in CYCLE_ENDS[1 : last // 5 + 1]}
    for step in CYCLE_ENDS[1 : last // 5 + 1]:
        weights = torch.load(folder.weights / f"step-{step}.pt", weights_only=True)
        assert weights.keys() == _state(step)["model.pt"].keys()
        assert all(torch.equal(v, torch.full((20_000,), float(step))) for v in weights.values())


# ------------------------------------------------------------------------------------------------ a disk that is slow


def test_training_goes_on_while_the_disk_is_slow_and_what_is_saved_is_the_state_of_its_step(tmp_path: Path, few: Path) -> None:
    """The disk takes the model of step 3 through a pipe, which is read only when the next save, at step 7, waits for it."""
    t = small(few, **SGDW, model="mnist5k_cnn_bn", checkpoint={"keep": 9})
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    store = Store(tmp_path / "slow")
    folder = store.trial(t.study, t.trial_id)
    partial = folder.checkpoints / ".step-3-attempt-1"
    partial.mkdir(parents=True)
    os.mkfifo(partial / "model.pt")
    ranks = Ranks(t, store, 1)
    ranks.wait_for_step(7)
    assert checkpoint.found(folder) == []
    assert folder.state().step == 7, "the next save waits for this one"
    written = torch.load(io.BytesIO((partial / "model.pt").read_bytes()), weights_only=True)
    assert ranks.wait(60) == [0], ranks.errors()

    expected = checkpoint.at(calm.trial(t.study, t.trial_id).checkpoints / "step-3-attempt-1").load("model.pt")
    assert written.keys() == expected.keys()
    assert any(name.endswith("running_var") for name in written)
    assert all(torch.equal(written[name], expected[name]) for name in written)
    assert json.loads(folder.result.read_text())["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))
    (warning,) = events(folder, "warning")  # a pipe cannot be synced
    assert warning["message"] == "the checkpoint of step 3 could not be written (rank 0: model.pt: Invalid argument); older ones are kept"
    assert {step for step, _, _ in checkpoint.found(folder)} == SAVES - {3}
    assert all(line["stall_seconds"] > 0 and line["step_seconds"] > 0 for line in events(folder, "checkpoint"))


# ------------------------------------------------------------------------------------------------ a disk that is full


def _save_twice(rank: int, path: Path, results: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", WRBENCH_RENDEZVOUS=f"file://{path}/rendezvous", CUDA_VISIBLE_DEVICES=""
    )
    folder = TrialFolder(path)
    with joined(30) as ranks:
        book = Journal(folder.journal, "abc", 1)
        for step, room in ((1, resource.RLIM_INFINITY), (2, 50_000 if rank else resource.RLIM_INFINITY), (3, resource.RLIM_INFINITY)):
            piece = {"start": 20_000 * rank, "exp_avg": torch.full((20_000,), float(step))}
            model = {"model.pt": {"weight": torch.full((2, 20_000), float(step))}} if rank == 0 else {}
            with no_room_beyond(room):
                saving = Saving(folder, ranks, "abc", 1, step, {**model, f"optimizer-{rank}.pt": {"weight": piece}}, {})
                results.send(saving.commit(book))
            ranks.barrier()
            results.send([p.name for p in sorted(folder.checkpoints.iterdir())])
            ranks.barrier()


def test_when_one_rank_has_no_room_no_rank_commits_and_the_next_save_is_tried(tmp_path: Path) -> None:
    ends = [_server.Pipe(duplex=False) for _ in range(2)]
    processes = [_server.Process(target=_save_twice, args=(rank, tmp_path, sender), daemon=True) for rank, (_, sender) in enumerate(ends)]
    for process in processes:
        process.start()
    for _, sender in ends:
        sender.close()
    said = [list(_received(receiver)) for receiver, _ in ends]
    for process in processes:
        process.join()
    failure = "rank 1: optimizer-1.pt: File too large"
    kept = ["step-1-attempt-1"]
    assert said == [[None, kept, failure, kept, None, [*kept, "step-3-attempt-1"]]] * 2
    saved, _ = checkpoint.newest(TrialFolder(tmp_path), "abc")
    assert saved is not None
    assert torch.equal(saved.optimizer_state()["weight"]["exp_avg"], torch.full((40_000,), 3.0))


def test_a_run_goes_on_while_the_disk_of_one_rank_is_full(tmp_path: Path, few: Path) -> None:
    t = small(few, **ADAMW, backend={"zero_stage": 1}, checkpoint={"keep": 9})
    calm, store = Store(tmp_path / "calm"), Store(tmp_path / "full")
    undisturbed = Ranks(t, calm, 2)
    assert undisturbed.wait() == [0, 0], undisturbed.errors()
    folder = store.trial(t.study, t.trial_id)
    ranks = Ranks(t, store, 2)
    pid = ranks.processes[1].pid
    assert pid is not None
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    while not events(folder, "warning"):
        assert ranks.processes[0].exitcode is None, ranks.errors()
        time.sleep(0.002)
    if ranks.processes[1].exitcode is None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert ranks.wait() == [0, 0], ranks.errors()

    warned = {line["step"] for line in events(folder, "warning")}
    assert 3 in warned
    assert warned | {step for step, _, _ in checkpoint.found(folder)} == SAVES
    assert warned | {line["step"] for line in events(folder, "checkpoint")} == SAVES
    assert all("(rank 1: optimizer-1.pt: File too large); older ones are kept" in line["message"] for line in events(folder, "warning"))
    assert not list(folder.checkpoints.glob(".*"))
    results = [json.loads(s.trial(t.study, t.trial_id).result.read_text()) for s in (calm, store)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))


def test_a_run_that_can_never_save_still_ends_with_its_result(tmp_path: Path, few: Path) -> None:
    t = small(few, **SGDW)
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    store = Store(tmp_path / "full")
    folder = store.trial(t.study, t.trial_id)
    with no_room_beyond(30_000):  # enough for the journal
        result = train(t, store)
    assert (result["state"], result["weights_sha256"]) == ("finished", undisturbed["weights_sha256"])
    assert result["metrics"].keys() == undisturbed["metrics"].keys()
    assert json.loads(folder.result.read_text()) == result
    assert {line["step"] for line in events(folder, "warning")} == SAVES
    assert list(folder.checkpoints.iterdir()) == []
    assert folder.state().state == "finished"
    assert history(folder) == history(calm.trial(t.study, t.trial_id))


def test_a_result_that_finds_no_room_is_an_error_and_the_trial_can_be_run_again(tmp_path: Path, few: Path) -> None:
    """Not even the journal has room after some steps."""
    t = small(few, **SGDW)
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    store = Store(tmp_path / "full")
    folder = store.trial(t.study, t.trial_id)
    told = (
        f"trial {t.trial_id} has finished, which cannot be recorded: File too large: [0-9]+ line\\(s\\) wait.*; make room and run it again"
    )
    with no_room_beyond(4000), pytest.raises(OSError, match=told) as error:
        train(t, store)
    assert "wait to be written" in error.value.__notes__[0]
    assert folder.state().state == "interrupted"
    assert 0 < folder.state().step < 21
    assert not folder.result.exists()
    result = train(t, store)
    assert (result["state"], result["attempts"], result["weights_sha256"]) == ("finished", 2, undisturbed["weights_sha256"])
    assert history(folder) == history(calm.trial(t.study, t.trial_id))


def test_a_full_disk_does_not_hide_why_a_trial_failed(tmp_path: Path, few: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(few, broken)
    shard = next(broken.glob("val-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-4096])
    t = small(broken, **SGDW)
    store = Store(tmp_path / "runs")
    folder = store.trial(t.study, t.trial_id)
    folder.write_config(t)
    folder.journal.write_bytes(b" " * 5000 + b"\n")
    with no_room_beyond(5000), pytest.raises(ValueError, match=shard.name) as error:
        train(t, store)
    assert "1 line(s) wait to be written" in error.value.__notes__[0]
