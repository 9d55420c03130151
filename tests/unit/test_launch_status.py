from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import BadInput, Trial
from harness.journal import Journal
from harness.store import Store
from harness.study import LoadedStudy, planned
from launch import status
from launch.ledger import Ledger, Life, Submitter
from tests.synthetic import STUDY, write_study, write_trial


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedStudy:
    return write_study(Store(tmp_path), STUDY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def searched(loaded: LoadedStudy) -> list[Trial]:
    return [p.trial for p in planned(loaded, {}) if p.trial is not None]


def states(loaded: LoadedStudy, store: Store) -> dict[str | None, str]:
    return {row.trial_id: row.state for row in status.rows(loaded, store)}


def test_every_trial_of_the_plan_has_a_row_in_its_state(loaded: LoadedStudy, store: Store) -> None:
    finished, failed, diverged, killed, running, pending, *_ = searched(loaded)
    write_trial(store, finished)
    write_trial(store, failed, "failed", until=0.4)
    write_trial(store, diverged, "diverged", until=0.2)
    write_trial(store, killed, "interrupted", until=0.5)
    write_trial(store, running, "interrupted", until=0.5)
    with store.trial(loaded.name, running.trial_id).lock():
        rows = {row.trial_id: row for row in status.rows(loaded, store)}
    assert [rows[t.trial_id].state for t in (finished, failed, diverged, killed, running, pending)] == [
        "finished", "failed", "diverged", "interrupted", "running", "pending",
    ]  # fmt: skip
    assert rows[None].state == "pending" and rows[None].phase == "finalists"
    assert rows[failed.trial_id].last_error == "RuntimeError: node_7 lost <power> & 50 % of its disks"
    assert rows[pending.trial_id].total_steps == 245 and rows[pending.trial_id].step == 0
    left = rows[running.trial_id].seconds_left
    assert left == pytest.approx((245 - rows[running.trial_id].step) * 0.05) and rows[killed.trial_id].seconds_left is None


def test_a_search_without_val_is_told_once_there_are_no_finalists(
    loaded: LoadedStudy, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third, *_ = searched(loaded)
    write_trial(store, first)
    write_trial(store, second, "diverged", until=0.2)
    status.show(loaded, store, watch=False)
    assert "searched without val" not in capsys.readouterr().out
    alone = write_study(Store(store.root / "elsewhere"), STUDY | {"finalists": None})
    write_trial(store, next(t for t in searched(alone) if t.trial_id == third.trial_id))
    status.show(alone, store, watch=False)
    assert "1 trial(s) searched without val, since finalists were configured then; keep finalists" in capsys.readouterr().out


def test_holdout_is_of_the_last_completed_cycle_and_no_maximum(loaded: LoadedStudy, store: Store) -> None:
    trial = searched(loaded)[0]
    folder = store.trial(loaded.name, trial.trial_id)
    folder.write_config(trial)
    journal = Journal(folder.journal, trial.trial_id, folder.claim())
    journal.write(0, event="start", resumed_from=0, total_steps=245)
    journal.write(34, metrics={"holdout/top1": 0.9, "anytime/holdout_top1": 0.9, "val/top1": 0.99})
    journal.write(69, metrics={"holdout/top1": 0.95, "anytime/holdout_top1": 0.9, "val/top1": 0.99})
    assert status.rows(loaded, store)[0].holdout_top1 == 0.9
    journal.write(104, metrics={"holdout/top1": 0.8, "anytime/holdout_top1": 0.8, "val/top1": 0.99})
    assert status.rows(loaded, store)[0].holdout_top1 == 0.8


def test_queued_lasts_from_the_ledger_until_the_attempt_begins_or_the_submitter_is_gone(loaded: LoadedStudy, store: Store) -> None:
    waiting, begun, *_ = searched(loaded)
    ledger = Ledger(store.study(loaded.name))
    ledger.append("queued", waiting, 1)
    ledger.append("submitted", begun, 1, job_id="1", place=0)
    write_trial(store, begun, "interrupted", until=0.1)
    with Submitter(store.study(loaded.name)).lock():
        found = states(loaded, store)
    assert (found[waiting.trial_id], found[begun.trial_id]) == ("queued", "interrupted")
    assert states(loaded, store)[waiting.trial_id] == "pending"
    ledger.append("submitted", waiting, 1, job_id="7", place=0)
    ledger.append("ended", waiting, 1, job_id="7", place=0, state="pending")
    with Submitter(store.study(loaded.name)).lock():
        assert states(loaded, store)[waiting.trial_id] == "pending"
    assert status.rows(loaded, store)[0].job_id == "7"


def test_an_attempt_without_an_end_is_explained_by_its_newest_log(loaded: LoadedStudy, store: Store) -> None:
    trial = searched(loaded)[0]
    write_trial(store, trial, "interrupted", until=0.1)
    folder = store.trial(loaded.name, trial.trial_id)
    assert status.last_error(folder, folder.state()) == "ended without a word, as when it is killed"
    trace = "a warning\nTraceback (most recent call last):\n  File x, line 1\n    raise\nOSError: the disk is full\nmore words\n"
    (folder.logs / "12_0_log.err").write_text("nothing\n")
    (folder.logs / "12_1_log.err").write_text(trace)
    assert status.last_error(folder, folder.state()) == "OSError: the disk is full"
    journal = Journal(folder.journal, trial.trial_id, 1)
    journal.write(20, event="stop")
    assert status.last_error(folder, folder.state()) is None


def test_sizes_have_three_digits() -> None:
    sizes = {0: "0 B", 999: "999 B", 999_499: "999 kB", 999_500: "1 MB", 999_999: "1 MB", 12_345_678: "12.3 MB", 4 * 10**12: "4 TB"}
    assert {count: status._size(count) for count in sizes} == sizes


def test_logs_are_found_by_the_beginning_of_an_id(loaded: LoadedStudy, store: Store) -> None:
    trial, other, *_ = searched(loaded)
    write_trial(store, trial, "failed", until=0.1)
    write_trial(store, other, "failed", until=0.1)
    folder = status.find_trial(loaded, store, trial.trial_id[:6])
    ledger = Ledger(store.study(loaded.name))
    assert list(status.logs(folder, ledger)) == [f"{folder.logs}: no logs yet"]
    for rank in (0, 1):
        (folder.logs / f"12_{rank}_log.err").write_text("\n".join(f"rank {rank} line {i}" for i in range(50)))
    lines = list(status.logs(folder, ledger, tail=2))
    assert lines[0] == f"==> {folder.logs}/12_0_log.err <==" and lines[1:3] == ["rank 0 line 48", "rank 0 line 49"]
    assert len(lines) == 6
    for prefix in ("zz", ""):
        with pytest.raises(BadInput, match=other.trial_id):
            status.find_trial(loaded, store, prefix)


def test_the_final_error_of_a_rank_is_found_however_torch_and_slurm_frame_it(tmp_path: Path) -> None:
    log = tmp_path / "7_0.0.1_1_log.err"
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "    g()", "RuntimeError: gloo: Timed out", ""]
    after = "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED ***\nsrun: error: n1: task 0: Killed\n"
    for prefix in ("", "[rank1]: "):
        log.write_text("a warning\n" + "\n".join(prefix + line for line in trace) + "\n" + after)
        assert status.final_error(log) == "RuntimeError: gloo: Timed out"
    log.write_text(after)
    assert status.final_error(log) is None
    waited = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE) ran for 600012 milliseconds"
    log.write_text(f"[rank1]:[E1127 12:00:00.1 ProcessGroupNCCL.cpp:683] [Rank 1] {waited}\nterminate called\n{after}")
    assert status.final_error(log) == waited


def test_a_job_that_slurm_itself_requeued_counts_as_such() -> None:
    def life(job_id: str, number: int, requeued: bool = False, kind: str = "preempted") -> Life:
        return Life({"job_id": job_id, "life": number}, None, {"event": "requeued", "kind": kind} if requeued else None)

    killed = [life("7_0", 0), life("7_0", 1), life("7_0", 1), life("7_0", 2)]  # once tried again in place
    assert status._returns(killed) == 2
    assert status._returns([*killed, life("9_0", 0)]) == 2, "another submission is none"
    assert status._returns([life("7_0", 0, requeued=True)]) == 1
    assert status._returns([life("7_0", 0, requeued=True), life("7_0", 1)]) == 1
    failed = life("7_0", 0, requeued=True, kind="elsewhere")
    assert status._returns([failed]) == status._returns([failed, life("7_0", 1)]) == 0, "a failure is none"
    assert status._returns([]) == 0
