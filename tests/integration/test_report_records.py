"""Tidy tables from a real MLflow store, and that store against the journals."""

from __future__ import annotations

import math
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from analysis.compare import compare
from harness import journal, schedule
from harness.config import BadInput
from harness.store import Store
from tests import synthetic

TABLES = ("trials", "history", "check")


@pytest.fixture
def store(synthetic_store: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(synthetic_store, tmp_path / "runs"))


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def sql(store: Path, statement: str) -> None:
    with sqlite3.connect(store / "mlflow.db") as db:
        assert db.execute(statement).rowcount > 0
    db.close()


def at_the_end(row: pd.Series, metric: str = "val/top1") -> str:
    return f"run_uuid = '{row.run_id}' AND key = '{metric}' AND step = 244"


def trial_of(store: Path, **where: object) -> pd.Series:
    table = runs.trials("synthetic", store)
    for column, value in where.items():
        table = table[table[column] == value]
    return table.iloc[0]


# ------------------------------------------------------------------------------------------ a row a trial


def test_every_planned_trial_is_a_row_with_its_state(synthetic_store: Path) -> None:
    table = runs.trials("synthetic", synthetic_store)
    assert tuple(table.columns[: len(runs.BASE)]) == runs.BASE
    counts = table.groupby(["arm", "phase"]).state.value_counts().to_dict()
    assert counts == {
        ("AdamWR", "search", "finished"): 3,
        ("AdamWR", "search", "failed"): 1,
        ("AdamWR", "finalists", "finished"): 3,
        ("AdamWR", "finalists", "interrupted"): 1,
        ("AdamWR", "finalists", "pending"): 1,
        ("SGDWR", "search", "finished"): 3,
        ("SGDWR", "search", "diverged"): 1,
        ("SGDWR", "finalists", "finished"): 5,
    }
    assert table.trial_id.is_unique
    assert table.planned.all()
    pending = table[table.state == "pending"].iloc[0]
    assert (pending.attempts, pending.step, pending.total_steps) == (0, 0, 245)
    assert pd.isna(pending.run_id)
    failed = table[table.state == "failed"].iloc[0]
    assert "lost <power> & 50 %" in failed.last_error
    assert failed.step < 245


def test_metrics_of_a_row_are_those_of_the_journal_at_the_last_cycle(synthetic_store: Path) -> None:
    table = runs.trials("synthetic", synthetic_store)
    for row in table[table.step > 0].to_dict("records"):
        folder = Store(synthetic_store).trial("synthetic", row["trial_id"])
        points = journal.fold(journal.read(folder.journal)).settled
        end = max(e for e in schedule.cycle_ends(folder.read_config()) if e <= row["step"]) - 1
        at_end = {p.metric: p.value for p in points if p.step == end}
        for metric in ("holdout/top1", "anytime/holdout_top1", "train_eval/loss"):
            assert row[metric] == at_end[metric], (row["trial_id"], metric)
        for metric in ("val/top1", "anytime/val_top1"):  # of finalists alone
            assert row[metric] == at_end[metric] if row["phase"] == "finalists" else math.isnan(row[metric]), (row["trial_id"], metric)
        losses = {p.step: p.value for p in points if p.metric == "train/loss" and p.step <= end}
        assert row["train/loss"] == losses[max(losses)]


def test_parameters_and_tags_are_columns(synthetic_store: Path) -> None:
    row = trial_of(synthetic_store, state="finished", arm="AdamWR")
    assert isinstance(row["optimizer.lr"], float)
    assert (row["optimizer.name"], row["workload.data.name"], row["budget.epochs"]) == ("adam", "mnist5k", 7)
    assert (row["tag.world_size"], row["tag.commit"]) == ("2", "c0ffee1")
    assert not [c for c in row.index if c.startswith("tag.mlflow")]


def test_seeds_of_one_configuration_share_its_config(synthetic_store: Path) -> None:
    table = runs.trials("synthetic", synthetic_store)
    finalists = table[(table.arm == "SGDWR") & (table.phase == "finalists")]
    assert len(finalists) == 5
    assert len(set(finalists.config)) == 1
    assert table[(table.arm == "SGDWR") & (table.phase == "search")].config.nunique() == 4


def test_a_killed_trial_is_a_row_with_the_answer_of_its_last_cycle(synthetic_store: Path) -> None:
    row = trial_of(synthetic_store, state="interrupted")  # at epoch 4.2, saved at 4; cycles end at 1, 3, 7
    assert (row.attempts, row.step) == (1, 4 * 35)
    history = runs.history("synthetic", synthetic_store)
    mine = history[history.trial_id == row.trial_id].set_index("step")
    assert row["val/top1"] == mine.loc[3 * 35 - 1, "val/top1"]
    assert row["val/top1"] != mine.loc[4 * 35 - 1, "val/top1"]


def test_an_older_evaluation_never_passes_for_the_answer(store: Path) -> None:
    row = trial_of(store, state="finished", phase="finalists")
    sql(store, f"DELETE FROM metrics WHERE {at_the_end(row, 'anytime/val_top1')}")
    assert math.isnan(trial_of(store, trial_id=row.trial_id)["anytime/val_top1"])


def test_trials_outside_the_study_are_rows_that_are_not_planned(store: Path) -> None:
    adam = synthetic.STUDY["arms"]["AdamWR"]
    synthetic.write_study(Store(store), synthetic.STUDY | {"arms": {"AdamWR": adam}})
    table = runs.trials("synthetic", store)
    left_over = table[~table.planned]
    assert len(left_over) == 9
    assert set(left_over.arm) == {"SGDWR"}
    assert left_over["anytime/holdout_top1"].notna().sum() == 9  # the diverged one had completed its first cycle


def test_without_mlflow_there_are_rows_and_no_numbers(store: Path) -> None:
    (store / "mlflow.db").unlink()
    table = runs.trials("synthetic", store)
    assert len(table) == 18
    assert (table.state == "undelivered").sum() == 14
    assert table["anytime/val_top1"].isna().all()
    assert runs.history("synthetic", store).empty


def test_without_the_store_mlflow_alone_tells_the_states(store: Path) -> None:
    before = runs.trials("synthetic", store)
    shutil.rmtree(store / "synthetic" / "trials")
    after = runs.trials("synthetic", store)
    assert after.state.to_list() == before.state.to_list()
    assert after["anytime/val_top1"].equals(before["anytime/val_top1"])


# -------------------------------------------------------------------------------------- a row a (trial, step)


def test_history_is_the_settled_journal(synthetic_store: Path) -> None:
    history = runs.history("synthetic", synthetic_store)
    assert history.columns[:6].to_list() == ["trial_id", "arm", "seed", "phase", "step", "epoch"]
    assert not history.duplicated(["trial_id", "step"]).any()
    for folder in Store(synthetic_store).trials("synthetic"):
        mine = history[history.trial_id == folder.path.name].set_index("step")
        settled = [p for p in journal.fold(journal.read(folder.journal)).settled if p.metric != "epoch"]
        assert all(np.array_equal(mine.loc[p.step, p.metric], p.value, equal_nan=True) for p in settled)
        assert mine.drop(columns=["trial_id", "arm", "seed", "phase", "epoch"]).notna().sum().sum() == sum(
            not math.isnan(p.value) for p in settled
        )
    assert np.allclose(history.epoch, (history.step + 1) / 35)


def test_inf_is_read_back_and_nan_stays_nan(synthetic_store: Path) -> None:
    row = trial_of(synthetic_store, state="diverged")
    points = runs.read("synthetic", synthetic_store).points
    mine = points[points.trial_id == row.trial_id].set_index(["metric", "step"]).value
    assert mine["val/loss", row.step - 1] == math.inf
    assert math.isnan(mine["train/loss", row.step - 1])


def test_the_last_value_of_a_metric_at_a_step_counts(store: Path) -> None:
    row = trial_of(store, state="finished", phase="finalists")
    again = (
        "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) SELECT key, 0.5, timestamp + 1, run_uuid, step, 0 FROM metrics"
    )
    sql(store, f"{again} WHERE {at_the_end(row)}")
    assert trial_of(store, trial_id=row.trial_id)["val/top1"] == 0.5


def test_deleted_runs_are_not_there(store: Path) -> None:
    row = trial_of(store, state="finished", phase="finalists")
    sql(store, f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = '{row.run_id}'")
    again = trial_of(store, trial_id=row.trial_id)
    assert pd.isna(again.run_id)
    assert math.isnan(again["anytime/val_top1"])


# ---------------------------------------------------------------------------------------------------- check


def says(store: Path, trial_id: str) -> str:
    checked = runs.check("synthetic", store)
    assert tuple(checked.columns) == runs.CHECKED
    return str(checked.set_index("trial_id").says[trial_id])


def test_a_delivered_study_agrees_with_its_journals(synthetic_store: Path) -> None:
    checked = runs.check("synthetic", synthetic_store)
    assert len(checked) == 17
    assert checked.agrees.all()
    assert (checked.lacking + checked.differing + checked.extra).sum() == 0
    assert (checked.in_journal > 0).all()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM metrics WHERE {end}", "1 point not in MLflow (first: val/top1 at step 244)"),
        ("DELETE FROM metrics WHERE {run} AND key = 'val/top1'", "7 points not in MLflow (first: val/top1 at step 34)"),
        ("UPDATE metrics SET value = 0.99 WHERE {end}", "1 point with another value in MLflow (first: val/top1 at step 244)"),
        ("UPDATE metrics SET is_nan = 1 WHERE {end}", "1 point with another value in MLflow"),
        ("UPDATE metrics SET step = 243 WHERE {end}", "1 point in MLflow and not final in the journal (first: val/top1 at step 243)"),
        ("UPDATE runs SET lifecycle_stage = 'deleted' WHERE {run}", "no run in MLflow; "),
        ("UPDATE tags SET value = 'failed' WHERE {run} AND key = 'state'", "finished in the journal, failed in MLflow"),
    ],
)
def test_what_mlflow_lacks_or_has_otherwise_is_found(store: Path, statement: str, said: str) -> None:
    row = trial_of(store, state="finished", phase="finalists")
    sql(store, statement.format(end=at_the_end(row), run=f"run_uuid = '{row.run_id}'"))
    assert said in says(store, row.trial_id)
    checked = runs.check("synthetic", store)
    assert checked[~checked.agrees.astype(bool)].trial_id.to_list() == [row.trial_id]


def test_a_finished_trial_whose_last_points_mlflow_lacks_is_pending_and_no_earlier_answer_passes_for_its_own(store: Path) -> None:
    row, before = trial_of(store, state="finished", phase="finalists", arm="AdamWR"), compare(runs.read("synthetic", store))
    sql(store, f"DELETE FROM metrics WHERE run_uuid = '{row.run_id}' AND step > 104")  # as read between two deliveries
    sql(store, f"UPDATE tags SET value = 'interrupted' WHERE run_uuid = '{row.run_id}' AND key = 'state'")
    again = runs.trials("synthetic", store).set_index("trial_id").loc[row.trial_id]
    assert (again.state, again.step) == ("undelivered", 105)
    found = compare(runs.read("synthetic", store))
    assert row.seed in before.arm("AdamWR").errors and row.seed not in found.arm("AdamWR").errors
    assert found.arm("AdamWR").pending == before.arm("AdamWR").pending + 1
    assert any("have finished, but MLflow lacks" in flag for flag in found.flags)


def test_trials_that_somebody_deleted_from_the_store_are_told(store: Path) -> None:
    shutil.rmtree(Store(store).trial("synthetic", trial_of(store, state="finished", arm="SGDWR").trial_id).path)
    flags = compare(runs.read("synthetic", store)).flags
    assert any(flag.startswith("1 of ") and "no longer in this store" in flag for flag in flags)


def test_points_after_the_last_checkpoint_are_not_missed(synthetic_store: Path) -> None:
    row = trial_of(synthetic_store, state="interrupted")
    assert journal.fold(journal.read(Store(synthetic_store).trial("synthetic", row.trial_id).journal)).pending
    assert says(synthetic_store, row.trial_id) == ""


def test_a_run_without_a_journal_is_said(store: Path) -> None:
    row = trial_of(store, state="failed")
    shutil.rmtree(store / "synthetic" / "trials" / row.trial_id)
    assert "without a journal" in says(store, row.trial_id)


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("read", TABLES)
def test_an_unknown_study_names_the_known_ones(synthetic_store: Path, read: str) -> None:
    with pytest.raises(BadInput, match=r"study: 'demi' is neither in the store .* nor a file; in the store: synthetic"):
        getattr(runs, read)("demi", synthetic_store)


def test_a_study_file_will_do_and_needs_no_store(tmp_path: Path) -> None:
    table = runs.trials("configs/study/demo.yaml", tmp_path / "nowhere")
    assert len(table) == 14
    assert set(table.state) == {"pending"}
    assert table.trial_id.isna().sum() == 6  # finalists that the search has not decided
    assert runs.history("configs/study/demo.yaml", tmp_path / "nowhere").empty
    assert runs.check("configs/study/demo.yaml", tmp_path / "nowhere").empty
    assert not (tmp_path / "nowhere").exists()


def test_a_database_that_is_not_mlflows_is_one_clear_line(store: Path) -> None:
    (store / "mlflow.db").write_text("not a database")
    with pytest.raises(runs.Unreadable, match=r"^MLflow cannot be read: \S+/mlflow.db: file is not a database; move it away"):
        runs.trials("synthetic", store)


def test_a_server_that_is_down_is_one_clear_line_without_the_password(synthetic_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(runs.Unreadable) as error:
        runs.trials("synthetic", synthetic_store, "http://me:s3cret@127.0.0.1:9")
    assert str(error.value).startswith("MLflow cannot be read: ")
    assert "s3cret" not in str(error.value)
    assert "\n" not in str(error.value)
