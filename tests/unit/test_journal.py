"""The journal: what lines mean, whatever was killed, repeated, torn or written by two attempts at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import journal
from harness.journal import Journal, Record
from tests.disk import no_room_beyond

Line = dict[str, Any]


def line(attempt: int, step: int, timestamp: int = 1, **fields: Any) -> Line:
    return {"trial": "t", "attempt": attempt, "step": step, "timestamp": timestamp, **fields}


def start(attempt: int, resumed_from: int, timestamp: int = 1) -> Line:
    return line(attempt, resumed_from, timestamp, event="start", resumed_from=resumed_from)


def loss(attempt: int, step: int, value: float | None = None) -> Line:
    return line(attempt, step, metrics={"train/loss": attempt + step / 100 if value is None else value})


def losses(attempt: int, steps: Iterable[int]) -> list[Line]:
    return [loss(attempt, step) for step in steps]


def checkpoint(attempt: int, steps_done: int) -> Line:
    return line(attempt, steps_done, event="checkpoint")


def end(attempt: int, step: int, state: str, **fields: Any) -> Line:
    return line(attempt, step, event="end", state=state, **fields)


def by_attempt(points: list[journal.Point]) -> dict[int, int]:
    assert len({(p.metric, p.step) for p in points}) == len(points)
    return {p.step: p.attempt for p in points}


# ------------------------------------------------------------------------------------------------- examples


def test_points_settle_at_the_checkpoint_and_not_before() -> None:
    lines = [start(1, 0), *losses(1, range(6))]
    record = journal.fold(lines)
    assert (record.settled, len(record.pending), record.committed, record.steps_done) == ([], 6, 0, 6)
    record = journal.fold([*lines, checkpoint(1, 4)])
    assert [p.step for p in record.settled] == [0, 1, 2, 3] and [p.step for p in record.pending] == [4, 5]
    assert (record.committed, record.steps_done) == (4, 6)


def test_the_end_settles_everything() -> None:
    record = journal.fold([start(1, 0), *losses(1, range(3)), end(1, 2, "finished")])
    assert len(record.settled) == 3 and not record.pending and record.state(running=False) == "finished"


def test_an_attempt_that_repeats_steps_replaces_what_was_not_final() -> None:
    record = journal.fold([start(1, 0), *losses(1, range(6)), checkpoint(1, 4), start(2, 4), *losses(2, range(4, 8)), checkpoint(2, 8)])
    assert by_attempt(record.settled) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2}
    assert not record.pending


def test_points_that_the_next_attempt_has_not_repeated_yet_are_gone() -> None:
    record = journal.fold([start(1, 0), *losses(1, range(6)), checkpoint(1, 4), start(2, 4)])
    assert not record.pending and record.steps_done == 4


def test_final_points_outlive_a_fall_back_to_an_older_checkpoint() -> None:
    lines = [start(1, 0), *losses(1, range(4)), checkpoint(1, 2), checkpoint(1, 4), start(2, 2), *losses(2, range(2, 6)), checkpoint(2, 6)]
    assert by_attempt(journal.fold(lines).settled) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}


def test_a_fall_back_may_log_steps_that_were_not_logged_before() -> None:
    lines = [start(1, 0), *losses(1, (0, 2)), checkpoint(1, 4), start(2, 0), *losses(2, range(4)), checkpoint(2, 4)]
    assert by_attempt(journal.fold(lines).settled) == {0: 1, 2: 1, 1: 2, 3: 2}


def test_a_checkpoint_whose_line_was_lost_is_known_by_the_start_that_used_it() -> None:
    record = journal.fold([start(1, 0), *losses(1, range(6)), start(2, 4), *losses(2, (4,))])
    assert by_attempt(record.settled) == {0: 1, 1: 1, 2: 1, 3: 1} and by_attempt(record.pending) == {4: 2}


def test_a_retry_does_not_take_back_what_the_failed_attempt_settled() -> None:
    failed = [start(1, 0), *losses(1, range(6)), checkpoint(1, 4), end(1, 5, "failed", error="boom")]
    retried = [*failed, start(2, 4), *losses(2, range(4, 8)), end(2, 7, "finished")]
    before, after = journal.fold(failed), journal.fold(retried)
    assert before.state(running=False) == "failed" and len(before.settled) == 6
    assert after.settled[:6] == before.settled
    assert by_attempt(after.settled) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    assert after.state(running=False) == "finished"


def test_whoever_ran_a_failed_attempt_may_give_it_up_and_nothing_else_changes() -> None:
    failed = [start(1, 0), *losses(1, range(3)), end(1, 2, "failed", error="boom")]
    before, after = journal.fold(failed), journal.fold([*failed, end(1, 2, "exhausted", error="boom, three times"), loss(1, 3)])
    assert after.end is not None and after.end["error"] == "boom, three times"
    assert after.settled == before.settled and not after.pending and after.steps_done == before.steps_done


def test_lines_after_the_end_of_their_attempt_count_for_nothing() -> None:
    lines = [start(1, 0), loss(1, 0), end(1, 0, "failed", error="first"), loss(1, 1), checkpoint(1, 2), end(1, 1, "failed", error="second")]
    record = journal.fold(lines)
    assert [p.step for p in record.settled] == [0] and record.committed == 0
    assert record.end is not None and record.end["error"] == "first"


def test_split_brain_an_older_attempt_counts_for_nothing_once_a_newer_one_has_started() -> None:
    stale = [loss(1, 3, -1.0), checkpoint(1, 100), line(1, 3, event="warning", message="stale"), end(1, 3, "failed", error="stale")]
    record = journal.fold([start(1, 0), *losses(1, range(3)), start(2, 0), *stale, loss(2, 0), *stale])
    assert by_attempt(record.pending) == {0: 2} and not record.settled
    assert (record.committed, record.end, record.warnings) == (0, None, [])


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ([], "pending"),
        ([start(1, 0)], "interrupted"),
        ([start(1, 0), line(1, 0, event="stop")], "interrupted"),
        ([start(1, 0), end(1, 0, "diverged")], "diverged"),
        ([start(1, 0), end(1, 0, "failed"), start(2, 0)], "interrupted"),
        ([end(1, 0, "failed", error="no shards")], "failed"),
        ([end(0, 0, "exhausted", error="no attempt began")], "exhausted"),
        ([end(0, 0, "exhausted", error="no attempt began"), start(1, 0)], "interrupted"),
        ([start(1, 0), line(1, 0, event="stop"), end(1, 0, "exhausted", error="time limit")], "exhausted"),
        ([start(1, 0), end(1, 0, "cancelled", error=None)], "cancelled"),
        ([start(1, 0), end(1, 0, "failed"), end(1, 0, "exhausted")], "exhausted"),
        ([start(1, 0), end(1, 0, "finished"), end(1, 0, "cancelled")], "finished"),
        ([start(1, 0), end(1, 0, "failed"), start(2, 0), end(1, 0, "exhausted")], "interrupted"),
    ],
)
def test_state(lines: list[Line], state: str) -> None:
    record = journal.fold(lines)
    assert record.state(running=False) == state
    assert record.state(running=True) == "running"


def test_stop_is_forgotten_by_the_next_start_and_warnings_are_not() -> None:
    stopped = [start(1, 0), line(1, 0, event="warning", message="w"), checkpoint(1, 1), line(1, 1, event="stop")]
    assert journal.fold(stopped).stopped and not journal.fold([*stopped, start(2, 1)]).stopped
    assert journal.fold([*stopped, start(2, 1)]).warnings == ["w"]


def test_first_and_last_timestamp() -> None:
    record = journal.fold([start(1, 0, 10), line(1, 0, 20, metrics={"a": 1.0}), start(2, 0, 30), line(1, 0, 40, metrics={"a": 1.0})])
    assert (record.first_timestamp, record.last_timestamp) == (10, 30)


# ---------------------------------------------------------------------------------------- any life of a trial

TOTAL = 12


def value(metric: str, step: int) -> float:
    return step + (0.5 if metric == "val/top1" else 0.0)


def metrics_at(step: int) -> dict[str, float]:
    names = ["train/loss", "time/train_seconds", *(["val/top1", "anytime/val_top1"] if step % 3 == 2 else [])]
    return {name: value(name, step) for name in names}


EVERYTHING = {(metric, step) for step in range(TOTAL) for metric in metrics_at(step)}


@st.composite
def lives(draw: st.DrawFn) -> bytes:
    """The journal of a trial that ends well after any number of attempts that did not."""
    text: list[bytes] = []
    saved = {0}
    clock = 0

    def write(attempt: int, step: int, **fields: Any) -> None:
        nonlocal clock
        clock += 1
        text.append(json.dumps(line(attempt, step, clock, **fields)).encode() + b"\n")

    def commit(attempt: int, steps: int) -> None:
        saved.add(steps)
        write(attempt, steps, event="checkpoint")

    attempts = draw(st.integers(1, 5))
    for attempt in range(1, attempts + 1):
        last = attempt == attempts
        step = draw(st.sampled_from(sorted(saved))) if draw(st.booleans()) else max(saved)
        saved.intersection_update(range(step + 1))  # those after it are damaged
        write(attempt, step, event="start", resumed_from=step)
        every = draw(st.integers(1, 5))
        writing = 0  # steps done of the save under way; 0: none

        until = TOTAL if last else draw(st.integers(step, TOTAL))
        for now in range(step, until):
            if attempt > 1 and draw(st.booleans()):  # the attempt before is still alive somewhere
                write(attempt - 1, draw(st.integers(0, TOTAL - 1)), metrics={"train/loss": -1.0})
                write(attempt - 1, TOTAL, event=draw(st.sampled_from(["checkpoint", "stop"])))
            write(attempt, now, metrics=metrics_at(now))
            if writing and ((now + 1) % every == 0 or draw(st.booleans())):
                commit(attempt, writing)
                writing = 0
            if (now + 1) % every == 0 and draw(st.booleans()):  # else the disk is full
                writing = now + 1
        death = "none" if last else draw(st.sampled_from(["killed", "killed committing", "torn", "stopped", "failed"]))
        if writing and death in ("none", "stopped"):
            commit(attempt, writing)
        if writing and death == "killed committing":  # between the checkpoint and its line
            saved.add(writing)
        if last:
            write(attempt, TOTAL - 1, event="end", state="finished", error=None)
            break
        if death == "torn":
            whole = json.dumps(line(attempt, until, clock, metrics={"train/loss": -1.0})).encode()
            text.append(whole[: draw(st.integers(1, len(whole) - 1))] + b"\n")  # the next attempt's Journal ends the line
        elif death == "stopped":
            commit(attempt, until)
            write(attempt, until, event="stop")
        elif death == "failed":
            write(attempt, until, event="end", state="failed", error="boom")
            write(attempt, until, metrics={"train/loss": -1.0})  # another rank, a moment later
    return b"".join(text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lives())
def test_a_trial_that_ends_has_every_point_exactly_once(text: bytes) -> None:
    record = journal.fold(journal.lines(text))
    assert {(p.metric, p.step) for p in record.settled} == EVERYTHING
    assert len(record.settled) == len(EVERYTHING) and not record.pending
    assert all(p.value == value(p.metric, p.step) for p in record.settled)
    assert record.state(running=False) == "finished" and record.steps_done == TOTAL


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lives(), st.floats(0, 1), st.floats(0, 1))
def test_a_longer_journal_only_appends_to_what_is_settled(text: bytes, one: float, other: float) -> None:
    """What delivery rests on: a point once delivered stays the same point, wherever the journal was cut when it was read."""
    shorter, longer = (journal.fold(journal.lines(text[: int(cut * len(text))])) for cut in sorted((one, other)))
    assert longer.settled[: len(shorter.settled)] == shorter.settled
    assert longer.committed >= shorter.committed
    for record in (shorter, longer):
        by_attempt([p for p in record.points() if p.metric == "train/loss"])
        assert all(p.value == value(p.metric, p.step) for p in record.settled)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lives(), st.floats(0, 1))
def test_a_glance_says_where_the_trial_stands_as_the_whole_journal_does(text: bytes, cut: float) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(text[: int(cut * len(text))])
        whole, glance = journal.fold(journal.read(Path(file.name))), journal.fold(journal.glance(Path(file.name)))
    for of_record in (
        lambda r: (r.state(running=False), r.steps_done, r.committed, r.stopped, r.end, r.starts, r.first_timestamp, r.last_timestamp),
        lambda r: {name: value for name, value in r.newest().items() if name in ("anytime/val_top1", "time/train_seconds")},
    ):
        assert of_record(glance) == of_record(whole)


def test_a_glance_reads_little_of_a_long_journal(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl", "t", 1)
    book.write(0, event="start", resumed_from=0)
    for step in range(1000):
        book.write(step, metrics=metrics_at(0) | ({"anytime/val_top1": 0.5} if step % 250 == 249 else {}))
    book.close()
    assert len(list(journal.glance(tmp_path / "journal.jsonl"))) <= 1 + 4 + 2


# -------------------------------------------------------------------------------------------------- the file


def read(path: Path) -> Record:
    return journal.fold(journal.read(path))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    book = Journal(path, "abc", 1)
    book.write(0, event="start", resumed_from=0)
    book.write(0, metrics={"train/loss": math.nan, "weights/norm": math.inf, "val/top1": 0.1 + 0.2})
    book.write(1, event="checkpoint")
    book.sync()
    book.close()
    points = {p.metric: p for p in read(path).settled}
    assert math.isnan(points["train/loss"].value) and points["weights/norm"].value == math.inf
    assert points["val/top1"].value == 0.1 + 0.2  # every bit
    first = next(journal.read(path))
    assert first["trial"] == "abc" and first["attempt"] == 1 and 1.6e12 < first["timestamp"] < 1e14


def test_an_absent_journal_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "journal.jsonl") == Record()


@pytest.mark.parametrize(
    "torn", [b'{"trial":"t","att', b"\x00\x00\x00", b'{"trial":"t","attempt":1,"step":3,"timestamp":5', b"\xff\xfe", b"7"]
)
def test_a_torn_line_swallows_neither_itself_nor_the_next_one(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, "t", 1)
    book.write(0, event="start", resumed_from=0)
    book.close()
    with path.open("ab") as file:
        file.write(torn)
    book = Journal(path, "t", 2)
    book.write(0, event="start", resumed_from=0)
    book.close()
    assert [s["attempt"] for s in read(path).starts] == [1, 2]


def _append(path: Path, attempt: int, n: int) -> None:
    book = Journal(path, "t", attempt)
    for step in range(n):
        book.write(step, metrics={f"m/{i}": float(step) for i in range(20)})
    os._exit(0)


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, attempt, 300)) for attempt in range(1, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = list(journal.read(path))
    assert len(lines) == len([raw for raw in path.read_bytes().splitlines() if raw]) == 1200
    assert all([entry["step"] for entry in lines if entry["attempt"] == a] == list(range(300)) for a in range(1, 5))


# --------------------------------------------------------------------------------------------- no room on the disk


def test_lines_without_room_wait_in_order_and_whole(tmp_path: Path) -> None:
    """The disk is full after any number of bytes of a line, its end included."""
    path = tmp_path / "journal.jsonl"
    book = Journal(path, "t", 1)
    step = 0
    for room in range(220):
        book.write(step, event="warning", message=f"{step:03}")
        with no_room_beyond(path.stat().st_size + room):
            book.write(step + 1, event="warning", message=f"{step + 1:03}")
            book.write(step + 2, event="warning", message=f"{step + 2:03}")
        step += 3
    book.write(step, event="warning", message=f"{step:03}")
    book.close()
    assert read(path).warnings == [f"{i:03}" for i in range(step + 1)]


def test_a_line_of_another_process_is_not_swallowed_by_one_without_room(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    book, other = Journal(path, "t", 1), Journal(path, "t", 1)
    book.write(0, event="warning", message="first")
    with no_room_beyond(path.stat().st_size + 20):
        book.write(1, event="warning", message="second")
    assert not path.read_bytes().endswith(b"\n")
    other.write(2, event="warning", message="other")
    book.write(3, event="warning", message="third")
    assert read(path).warnings == ["first", "other", "second", "third"]


def test_lines_that_never_found_room_are_an_error_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, "t", 1)
    with no_room_beyond(0):
        book.write(0, event="start", resumed_from=0)
        book.write(0, metrics={"train/loss": 1.0})
        with pytest.raises(OSError, match=r"File too large: 2 line\(s\) wait to be written"):
            book.sync()
        with pytest.raises(OSError, match=r"2 line\(s\) wait"):
            book.close()
    assert read(path) == Record()
