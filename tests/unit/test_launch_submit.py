from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.config import Backend, BadInput, Local, Trial
from harness.store import Store, close
from harness.study import LoadedStudy, load, planned
from launch import submit
from launch.ledger import Submitter
from launch.local import Running, Stop, deaf_to_the_terminal, places, visible_gpus
from launch.plan import _already, cycle_end_epochs, measured_seconds_per_step
from launch.progress import Lines
from launch.standing import Standings, standings
from launch.submit import Submission
from launch.terminal import console, duration, table
from tests.synthetic import STUDY, write_study, write_trial
from tests.trials import trial
from tests.unit.conftest import Command


def searched(loaded: LoadedStudy) -> list[Trial]:
    return [p.trial for p in planned(loaded, {}) if p.trial is not None]


def test_each_place_has_gpus_of_its_own() -> None:
    assert places(2, 2, []) == [[], []]
    assert places(8, 2, [0, 1, 2, 3, 4]) == [[0, 1], [2, 3]]
    assert places(1, 1, [5, 7]) == [[5]]
    assert places(3, 4, [0, 1]) == [[], [], []]  # too few for one trial: all on the CPU


def test_gpus_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, numbers in (("2,3", [2, 3]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert visible_gpus() == numbers
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f2e")
    with pytest.raises(BadInput, match="must be numbers"):
        visible_gpus()


def test_a_study_s_ranks_come_before_the_cluster_s(tmp_path: Path) -> None:
    local, debug = Local(executor="local", ranks=4), Local(executor="debug", ranks=4)
    loaded = write_study(Store(tmp_path), STUDY)
    assert (submit.world_size(loaded, local), submit.world_size(loaded, debug)) == (4, 1)
    loaded = write_study(Store(tmp_path), STUDY | {"ranks": 2})
    assert (submit.world_size(loaded, local), submit.world_size(loaded, debug)) == (2, 1)


def test_nothing_is_submitted_when_all_has_ended_and_failures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    loaded = write_study(store, STUDY | {"finalists": None})
    for place, one in enumerate(searched(loaded)):
        write_trial(store, one, {1: "failed", 2: "diverged"}.get(place, "finished"), until=0.4 if place in (1, 2) else 1.0)
    failed = searched(loaded)[1]
    with Stop() as stop:
        work = Submission(loaded, store, Local(executor="local"), Lines(console()), stop, phase=None, retry=False)
        work.run()
    assert work.submitted == 0 and not (store.study(loaded.name) / "ledger.jsonl").exists()
    assert len(work.problems) == 1 and failed.trial_id in work.problems[0] and "--retry" in work.problems[0]
    assert "7 finished, 0 running, 0 waiting, 1 failed" in capsys.readouterr().out


@pytest.fixture
def ended(tmp_path: Path, mnist5k: Path) -> LoadedStudy:
    """A study in tmp_path of which all trials have ended, one failed and one diverged."""
    store = Store(tmp_path)
    loaded = write_study(store, STUDY | {"finalists": None, "workload": {"name": "mnist5k_cnn", "data": {"path": str(mnist5k)}}})
    for place, one in enumerate(searched(loaded)):
        write_trial(store, one, {1: "failed", 2: "diverged"}.get(place, "finished"), until=0.4 if place in (1, 2) else 1.0)
    return loaded


def test_an_exhausted_trial_is_run_again_by_retry_alone(tmp_path: Path) -> None:
    """SLURM's supervisor gave it up; here it goes on."""
    store = Store(tmp_path)
    loaded = write_study(store, STUDY | {"finalists": None})
    one = searched(loaded)[0]
    write_trial(store, one, "interrupted", until=0.4)
    assert close(store.trial(loaded.name, one.trial_id), "exhausted", "the time limit came 21 times")

    def work(retry: bool) -> Submission:
        with Stop() as stop:
            made = Submission(loaded, store, Local(executor="local"), Lines(console()), stop, phase=None, retry=retry)
            made.code = tmp_path / "code"
            made._enqueue({})
        return made

    (problem,) = work(retry=False).problems
    assert "exhausted before: the time limit came 21 times; run it again with --retry" in problem
    again = work(retry=True)
    assert one.trial_id in {t.trial_id for t in again.queue} and not again.problems


def test_what_mlflow_could_not_be_given_is_a_warning(
    ended: LoadedStudy, tmp_path: Path, wrbench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in the journals; the status is that of the training."""
    log = tmp_path / ended.name / "delivery.log"
    log.write_text("2026-01-01 00:00:00 of an earlier submission\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:s3cret@127.0.0.1:9")
    code, out, err = wrbench("study", "submit", ended.source, "--store", tmp_path)
    assert code == 1 and out.splitlines()[-2:] == [
        "submitted 0, running 0, finished 6, diverged 1, failed 1",
        "delivering the rest to MLflow",
    ]  # the failed trial is why
    (warning,) = (line for line in err.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: not delivered to MLflow: MLflow at http://***@127.0.0.1:9")
    assert warning.endswith(f"to deliver them: wrbench sync {ended.source} --store {tmp_path}")
    assert "earlier" not in warning


def test_a_tracking_store_that_cannot_be_is_refused_before_anything_starts(
    ended: LoadedStudy, tmp_path: Path, wrbench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://bar")
    code, out, err = wrbench("study", "submit", ended.source, "--store", tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: MLFLOW_TRACKING_URI: 'foo://bar'") and err.count("\n") == 1
    assert not (tmp_path / ended.name / "code").exists()


def test_several_ranks_cannot_meet_below_a_name_that_torch_cuts(ended: LoadedStudy, tmp_path: Path) -> None:
    """As it would an address: at the first ? or #."""
    store = Store(tmp_path / "C#" / "runs")
    with pytest.raises(BadInput, match=r"^--store .*/C#/runs: ranks meet "):
        submit.check(ended, store, Local(executor="local", ranks=2))
    submit.check(ended, store, Local(executor="local", ranks=1))
    submit.check(ended, store, Local(executor="debug", ranks=2))


def test_a_second_submission_names_the_first(ended: LoadedStudy, tmp_path: Path, wrbench: Command) -> None:
    with Submitter(tmp_path / ended.name).lock():
        code, out, err = wrbench("study", "submit", ended.source, "--store", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"another submission runs them: process {os.getpid()} on {socket.gethostname()}"


def test_a_failed_trial_is_not_shown_as_done(ended: LoadedStudy, tmp_path: Path) -> None:
    """Seven have all their 245 steps, of the failed one 91 are known; none are left to wait for."""
    with Stop() as stop:
        work = Submission(ended, Store(tmp_path), Local(executor="local"), Lines(console()), stop, phase=None, retry=False)
        work._enqueue({})
        now = work._snapshot(0.0, 0)
    assert (now.steps, now.total_steps) == (7 * 245 + 91, 8 * 245)
    assert now.seconds_left == 0


def test_finalists_that_no_search_decided_are_a_problem(tmp_path: Path) -> None:
    store = Store(tmp_path)
    loaded = write_study(store, STUDY)
    write_trial(store, searched(loaded)[0])
    with Stop() as stop:
        work = Submission(loaded, store, Local(executor="local"), Lines(console()), stop, phase="finalists", retry=False)
        work.run()
    assert [line.split(":")[0] for line in work.problems] == ["AdamWR", "SGDWR"]


def test_stop_counts_signals_and_gives_them_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == 2
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_job_that_ends_before_it_is_told_to_is_no_error(tmp_path: Path, gone: int) -> None:
    one = trial()
    seen_alive = SimpleNamespace(done=lambda: False)
    Running(one, Store(tmp_path).trial(one.study, one.trial_id), None, 1, {"job_id": str(gone)}, seen_alive).signal(signal.SIGTERM)


def test_nor_is_a_submitter(ended: LoadedStudy, tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    holders = iter([(socket.gethostname(), gone), None])
    monkeypatch.setattr(Submitter, "holder", lambda self: next(holders))
    assert submit.cancel(ended, Store(tmp_path)) == [f"stopped the submitter, process {gone}"]


def test_children_are_deaf_to_the_terminal_and_this_process_is_not() -> None:
    asks = "import signal; print(sorted(s.name for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with deaf_to_the_terminal():
        done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['SIGHUP', 'SIGINT']"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("schedule", "budget", "ends"),
    [
        ({"name": "cosine_restarts", "t_0": 1, "t_mult": 2}, 7, [1, 3, 7]),
        ({"name": "cosine_restarts", "t_0": 1, "t_mult": 2}, 6, [1, 3]),
        ({"name": "cosine_restarts", "t_0": 1.5, "t_mult": 1}, 4.5, [1.5, 3, 4.5]),
        ({"name": "cosine"}, 7, [7]),
    ],
)
def test_cycle_ends_in_epochs_are_as_configured(schedule: dict[str, object], budget: float, ends: list[float]) -> None:
    assert cycle_end_epochs(trial(schedule=schedule, budget={"epochs": budget, "global_batch_size": 100})) == ends


def test_cost_is_measured_on_finished_trials_like_these(tmp_path: Path) -> None:
    store = Store(tmp_path)
    loaded = write_study(store, STUDY)
    one, two, *_ = searched(loaded)
    write_trial(store, one, "interrupted", until=0.5)
    assert measured_seconds_per_step(one, 2, store) is None
    write_trial(store, two)
    assert measured_seconds_per_step(one, 2, store) == pytest.approx(0.05, rel=0.1)
    assert measured_seconds_per_step(one, 4, store) is None
    assert measured_seconds_per_step(trial(budget={"epochs": 7, "global_batch_size": 50}), 2, store) is None
    unlike = ({"compile": True}, {"deterministic": True}, {"name": "fsdp"}, {"micro_batch_size": 10})
    others = [one.model_copy(update={"backend": Backend.model_validate(backend)}) for backend in unlike]
    assert [measured_seconds_per_step(other, 2, store) for other in others] == [None] * 4
    patient = one.model_copy(update={"backend": Backend(timeout_seconds=100)})
    assert measured_seconds_per_step(patient, 2, store) is not None


def test_columns_are_apart_where_their_names_have_spaces() -> None:
    def header(*columns: str) -> str:
        out = console()
        with out.capture() as captured:
            out.print(table(columns, [["1", "2"]]))
        return captured.get().splitlines()[0].rstrip()

    assert header("seed sd", "difference") == "seed sd  difference"
    assert header("arm", "seed") == "arm seed"


def test_durations_for_people() -> None:
    assert [duration(s) for s in (None, 0.4, 59.6, 61, 3661)] == ["-", "0s", "1m00s", "1m01s", "1h01m"]


def test_ranks_that_outlive_one_of_them_are_noticed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.local.SECONDS_APART", 0.3)
    ranks = "import subprocess; ranks = [subprocess.Popen(['sleep', '60']) for _ in range(2)]; print(ranks[0].pid, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{ranks}; ranks[0].wait(); ranks[1].wait()"], stdout=subprocess.PIPE, text=True
    ) as controller:
        running = Running(trial(), Store(tmp_path).trial("mine", "1"), 0, 1, {"job_id": str(controller.pid), "place": 0})
        assert not running.has_lost_a_rank(2), "as they start, one after the other"
        assert controller.stdout is not None
        first = int(controller.stdout.readline())
        assert not running.has_lost_a_rank(2)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        assert not running.has_lost_a_rank(2)
        time.sleep(0.4)
        assert running.has_lost_a_rank(2)
        for pid in Path(f"/proc/{controller.pid}/task/{controller.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        controller.wait(10)
    assert not running.has_lost_a_rank(2)


def test_plan_says_what_the_store_has_already(synthetic_store: Path) -> None:
    loaded, now = load(synthetic_store / "synthetic" / "study.yaml"), standings(Store(synthetic_store), "synthetic")
    (line,) = _already(planned(loaded, now.results()), now)
    said = line.removeprefix("of this study the store has ").split(", ")
    assert sorted(said) == ["1 diverged", "1 failed", "1 interrupted", "14 finished"]
    (line,) = _already([], now)
    assert line.startswith("of this study the store has 17 not in this plan")
    assert list(_already(planned(loaded, {}), Standings({}))) == []
