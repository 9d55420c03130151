"""What a person does with a study on a cluster: submit it, again, retry, prune, cancel, extend and chain it; on real SLURM."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import journal
from harness.study import load
from launch import slurm, status
from launch.ledger import Ledger
from tests.faults.kills import PYTHON
from tests.slurm.cluster import Cluster
from tests.slurm.study import ADAMW, SGDW, Study, refuse, steps, until

pytestmark = pytest.mark.xdist_group("beside")

ROOT = Path(__file__).resolve().parents[2]
ONE: dict[str, Any] = {"tasks_per_node": 1, "gpus_per_node": None, "stall_timeout_seconds": 600}
"""of a cluster file: one rank a trial"""
LATER = ONE | {"sbatch": {"begin": "now+1hour"}}
"""nothing of this will run"""
TINY: dict[str, Any] = {"ranks": 1, "budget": {"epochs": 0.2}}


@pytest.fixture(autouse=True)
def jobs(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, without jobs after a test."""
    yield cluster
    subprocess.run(["scancel", f"--user={os.getuid()}"], check=True, timeout=60)
    until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, check=True, timeout=60).stdout, 60)


def rewrite(study: Study, **document: Any) -> None:
    study.file.write_text(yaml.safe_dump(yaml.safe_load(study.file.read_text()) | document))


def states(study: Study) -> dict[tuple[str, int], str]:
    """(arm, seed) -> state, as `status --json` tells it"""
    return {(r.arm, r.seed): r.state for r in status.rows(load(study.file), study.store)}


def lines(study: Study, event: str) -> list[dict[str, Any]]:
    return [one for one in Ledger(study.store.study(study.name)).lines() if one["event"] == event]


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_submitted_twice_run_once_packed_and_retried(tmp_path: Path, mnist5k: Path) -> None:
    """Three trials share a task; the second one's ranks fail."""
    bad = tmp_path / "bad"
    python = executable(tmp_path / "python", f'[[ -s {bad} && "$*" == *$(cat {bad})* ]] && exit 3\nexec {sys.executable} "$@"')
    study = Study(tmp_path, mnist5k, ONE | {"trials_per_task": 3, "max_retries": 0, "python": str(python)}, **TINY, search={"seeds": 3})
    bad.write_text(str([r.trial_id for r in status.rows(load(study.file), study.store)][1]))

    assert "submitted 3" in study.submit()
    assert study.in_queue() == [job := study.in_queue()[0]], "one task"
    assert "submitted 0" in study.submit()
    study.wait("finished", "failed")
    assert list(states(study).values()) == ["finished", "failed", "finished"]
    assert {one["job_id"] for one in lines(study, "started")} == {job}

    until(lambda: not study.in_queue(), 60)
    code, out, err = study.run("submit")
    assert code == 1 and "submitted 0" in out and err.count("--retry") == 1, out + err
    bad.write_text("")
    assert "submitted 1" in study.submit("--retry")
    study.wait("finished")
    assert [result["attempts"] for result in study.results().values()] == [1, 1, 1]  # the failing ranks got to no attempt of their own
    assert sorted(len(study.entry(folder).lives) for folder in study.folders()) == [1, 1, 2]
    assert len({one["token"] for one in lines(study, "submitted")}) == 2


def test_stopped_ones_save_first_and_are_gone_on_with(tmp_path: Path, mnist5k: Path) -> None:
    document = {"ranks": 1, "budget": {"epochs": 24}, "evaluation": {"every_epochs": 10}, "checkpoint": {"every_epochs": 10}}
    study = Study(tmp_path, mnist5k, ONE | {"trials_per_task": 2}, **document, arms={"A": ADAMW, "B": SGDW})
    a, b = study.folder("A"), study.folder("B")
    study.submit()
    until(lambda: steps(a) > 5)
    rewrite(study, arms={"B": SGDW})
    study.submit("--prune")  # A saves itself, and its task goes on with B
    until(b.is_running)
    record = journal.fold(journal.read(a.journal))
    saved = record.committed
    assert record.stopped and 0 < saved < 24 * 35
    assert study.trials()[a.path.name].state == "cancelled"

    rewrite(study, arms={"A": ADAMW, "B": SGDW})
    assert "submitted 1" in study.submit()
    until(lambda: steps(a) > saved)
    code, out, err = study.run("cancel")
    assert code == 0 and f"A seed 0 {a.path.name}: stopping" in out, out + err
    assert not study.in_queue()
    assert study.trials()[a.path.name].state == "cancelled"
    assert study.trials()[b.path.name].state in ("cancelled", "finished")

    rewrite(study, arms={"A": ADAMW})
    assert "submitted 1" in study.submit()
    until(lambda: len(starts := journal.fold(journal.read(a.journal)).starts) == 3 and steps(a) > starts[2]["resumed_from"])
    resumed = [start["resumed_from"] for start in journal.fold(journal.read(a.journal)).starts]
    assert resumed[:2] == [0, saved] and resumed[2] > saved

    job_id = study.entry(a).job_id
    subprocess.run(["scancel", job_id], check=True, timeout=60)  # by somebody who does not know of wrbench
    until(lambda: not study.in_queue())
    assert study.entry(a).lives[-1].ended["kind"] == "terminated"
    assert lines(study, "requeued") == []
    slurm.cancel([job_id], "USR2")  # one that has ended meanwhile is no error


def test_a_suspended_trial_runs_and_is_resumed_to_save_itself(tmp_path: Path, mnist5k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"ranks": 1, "budget": {"epochs": 24}, "evaluation": {"every_epochs": 10}, "checkpoint": {"every_epochs": 10}}
    study = Study(tmp_path, mnist5k, ONE | {"python": f"{PYTHON} *=pace@50"}, **document)
    folder = study.folder()

    def suspend(after: int) -> None:
        until(lambda: folder.is_running() and steps(folder) > after)
        subprocess.run(["scontrol", "suspend", study.entry(folder).job_id], check=True, timeout=60)

    study.submit()
    suspend(5)
    (row,) = status.rows(load(study.file), study.store)
    assert (row.state, row.reason) == ("running", "suspended")
    code, out, err = study.run("cancel")
    assert code == 0 and f"AdamWR seed 0 {folder.path.name}: stopping" in out, out + err
    record = journal.fold(journal.read(folder.journal))
    assert record.stopped and not study.in_queue()

    study.submit()
    suspend(record.committed)
    refuse(tmp_path / "bin", "scontrol", "resume", "Access/permission denied")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    code, out, err = study.run("cancel")
    assert code == 0 and "may not be resumed (Access/permission denied): killed, without what it did" in out, out + err
    until(lambda: not study.in_queue())
    assert study.trials()[folder.path.name].state == "cancelled"


def test_what_waits_survives_that_its_folder_is_deleted(tmp_path: Path, mnist5k: Path) -> None:
    study = Study(tmp_path, mnist5k, LATER, **TINY)
    study.submit()
    folder, job_id = study.folder(), study.entry(study.folder()).job_id
    shutil.rmtree(folder.path)
    assert "submitted 0" in study.submit()
    assert folder.read_config().arm == "AdamWR"
    shutil.rmtree(folder.path)
    subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], check=True, timeout=60)
    until(lambda: not study.in_queue())
    (log,) = study.store.study(study.name).glob("submissions/*/*_log.err")
    assert f"{folder.path.name}: its folder was deleted while it waited; submit the study again" in log.read_text()


def test_waiting_ones_leave_the_queue_and_only_what_is_new_is_submitted(tmp_path: Path, mnist5k: Path) -> None:
    study = Study(tmp_path, mnist5k, LATER, **TINY, search={"seeds": 2})
    study.submit()
    assert len(study.in_queue()) == 2

    space = {"optimizer.lr": {"log_uniform": [0.001, 0.01]}}
    searched = {"arms": {"AdamWR": ADAMW | {"optimizer": {"name": "adam"}, "space": space}}}
    rewrite(study, search={"seeds": 3}, arms={"AdamWR": ADAMW, "SGDWR": SGDW})  # a seed and an arm more
    assert "submitted 4" in study.submit() and "submitted 0" in study.submit()
    assert len(study.in_queue()) == 6

    rewrite(study, search={"seeds": 1}, arms={"AdamWR": ADAMW})
    left = [trial_id for trial_id, s in study.trials().items() if (s.entry.newest["arm"], s.entry.newest["seed"]) != ("AdamWR", 0)]
    out = study.submit()
    assert "submitted 0" in out and f"still queued or running: {', '.join(sorted(left))}; --prune cancels" in out
    assert "5 of them queued or running (submit --prune cancels these)" in " ".join(study.run("status")[1].split())
    assert len(study.in_queue()) == 6
    assert f"left the study file, and still queued or running: {', '.join(sorted(left))}" in study.run("submit", "--prune", "--dry-run")[1]
    assert study.submit("--prune").count("taken out of the queue") == 5
    until(lambda: len(study.in_queue()) == 1, 30)
    assert {study.trials()[trial_id].state for trial_id in left} == {"cancelled"}

    code, out, err = study.run("cancel")
    assert code == 0 and out.count("taken out of the queue") == 1, out + err
    until(lambda: not study.in_queue(), 30)
    assert states(study) == {("AdamWR", 0): "cancelled"}
    assert study.run("cancel") == (0, "nothing of mine is running\n", "")
    assert "submitted 1" in study.submit()

    points = Study(tmp_path / "points", mnist5k, LATER, name="points", **TINY, **searched, search={"points": 2}, sampler={"name": "halton"})
    points.submit()
    rewrite(points, search={"points": 5})
    assert "submitted 3" in points.submit()
    assert len(points.in_queue()) == 5


def test_dry_run_prints_the_script_and_the_trials_and_writes_nothing(tmp_path: Path, mnist5k: Path) -> None:
    study = Study(tmp_path, mnist5k, ONE | {"setup": ["module() { true; }"], "sbatch": {"exclude": "n4"}}, **TINY, search={"seeds": 2})
    before = sorted(tmp_path.rglob("*"))
    out = study.submit("--dry-run")
    assert "#SBATCH --array=0-1%2" in out and "#SBATCH --exclude=n4" in out and "#SBATCH --job-name=wrbench-mine" in out
    assert out.index("\nmodule() { true; }\n") < out.index("\nexport PYTHONPATH="), "a module's PYTHONPATH comes second"
    assert "launch.task" in out and "2 trial(s) to submit" in out
    assert [r.trial_id for r in status.rows(load(study.file), study.store) if str(r.trial_id) in out] != []
    assert sorted(tmp_path.rglob("*")) == before
    assert not study.in_queue()

    rewritten = yaml.safe_load(study.cluster.read_text()) | {"sbatch": {"exclud": "n4"}}
    study.cluster.write_text(yaml.safe_dump(rewritten))
    code, _, err = study.run("submit")
    assert (
        code == 2 and err == "error: sbatch.exclud: is no option of the sbatch here; did you mean 'exclude'? `sbatch --help` lists them\n"
    )
    assert not study.store.study("mine").exists()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each array given to sbatch."""
    real, log = shutil.which("sbatch"), tmp_path / "calls"
    executable(tmp_path / "bin" / "sbatch", f'[ "$1" = --help ] || echo call >> {log}\nexec {real} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return log


def test_a_thousand_trials_in_one_call(tmp_path: Path, mnist5k: Path, calls: Path) -> None:
    study = Study(tmp_path, mnist5k, LATER, **TINY, search={"seeds": 1000})
    began = time.monotonic()
    assert "submitted 1000" in study.submit()
    assert time.monotonic() - began < 10
    assert calls.read_text() == "call\n"
    assert len(study.in_queue()) == 1000
    assert "submitted 0" in study.submit()
    assert study.run("cancel")[0] == 0
    until(lambda: not study.in_queue(), 60)
    assert set(states(study).values()) == {"cancelled"}


def test_the_fewest_calls_that_the_cluster_allows(
    tmp_path: Path, mnist5k: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    other = Cluster(short_path, accounting=False, nodes=1, max_array_size=41)
    for name, value in other.environment().items():
        monkeypatch.setenv(name, value)
    other.start()
    try:
        study = Study(tmp_path, mnist5k, LATER, **TINY, search={"seeds": 100})
        assert "submitted 100" in study.submit()
        assert calls.read_text() == "call\n" * 3
        assert len(study.in_queue()) == 100
    finally:
        other.stop()
        monkeypatch.undo()  # the jobs to be removed are the usual cluster's


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sockets have short paths."""
    return tmp_path_factory.mktemp("c") / "c"


@pytest.mark.parametrize("by", ["user", "qos"])
def test_no_more_than_a_user_may_have_in_the_queue(tmp_path: Path, mnist5k: Path, by: str) -> None:
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    limited = {"user": (user, "MaxSubmitJobs"), "qos": ("normal", "MaxSubmitJobsPerUser")}[by]

    def limit(tasks: int) -> None:
        change = ["sacctmgr", "-i", "modify", by, limited[0], "set", f"{limited[1]}={tasks}"]
        subprocess.run(change, check=True, capture_output=True, timeout=60)

    study = Study(tmp_path, mnist5k, LATER | ({"qos": "normal"} if by == "qos" else {}), **TINY, search={"seeds": 5})
    limit(3)
    try:
        out = study.submit()
        assert "submitted 3" in out and "2 trial(s) are beyond what this user may have in the queue" in out
        assert "submitted 0" in study.submit()
    finally:
        limit(-1)
    assert "submitted 2" in study.submit()
    assert len(study.in_queue()) == 5


def test_code_is_what_it_was_when_submitted(tmp_path: Path, mnist5k: Path) -> None:
    """From a copy of the code, which is changed while its job waits."""
    copy = tmp_path / "copy"
    for part in ("harness", "launch", "analysis", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(copy), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True, timeout=60)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    rank = copy / "launch" / "rank.py"
    original = rank.read_text()

    def say(what: str) -> None:
        rank.write_text(original.replace('print(f"{options.trial}:', f'print(f"{what}: {{options.trial}}:'))
        assert rank.read_text() != original

    say("as submitted")
    (copy / "launch" / "later.py").write_text("UNTRACKED = 1\n")
    study = Study(tmp_path, mnist5k, LATER, **TINY)
    submitted = subprocess.run(
        [sys.executable, "-m", "launch", "study", "submit", study.file, "--cluster", study.cluster, "--store", study.store.root],
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "SBATCH_TIMELIMIT": "7"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "submitted 1" in submitted.stdout
    say("edited later")
    (copy / "harness" / "train.py").write_text("raise SystemExit('edited later')\n")
    folder = study.folder()
    assert slurm.job(study.entry(folder).job_id)["TimeLimit"] == "00:07:00", "a person's own SBATCH_ variables hold"
    subprocess.run(["scontrol", "update", f"JobId={study.entry(folder).job_id}", "StartTime=now"], check=True, timeout=60)
    study.wait("finished")

    said = "".join(path.read_text() for path in folder.logs.iterdir())
    assert f"as submitted: {folder.path.name}:" in said and "edited later" not in said
    (start,) = journal.fold(journal.read(folder.journal)).starts
    code = study.entry(folder).code
    assert (start["code"], start["commit"]) == (code, f"{commit}-dirty")
    diff = (study.store.study("mine") / "code" / code / "uncommitted.diff").read_text()
    assert "as submitted" in diff and "+UNTRACKED = 1" in diff


def chained() -> list[str]:
    """The chain jobs that wait."""
    command = ["squeue", "--noheader", "--format=%i %j %t"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [job for job, name, state in map(str.split, found) if "chain" in name and state == "PD"]


def test_a_chain_keeps_a_place_in_the_queue_and_follows_the_study(tmp_path: Path, mnist5k: Path) -> None:
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()

    def limit(tasks: int) -> None:
        change = ["sacctmgr", "-i", "modify", "user", user, "set", f"MaxSubmitJobs={tasks}"]
        subprocess.run(change, check=True, capture_output=True, timeout=60)

    study = Study(tmp_path, mnist5k, LATER, **TINY, search={"seeds": 3})
    limit(3)
    try:
        out = study.submit("--chain")
        assert "submitted 2" in out and "goes on when" in out
        first = chained()
        assert "submitted 0" in study.submit("--chain") and chained() == first and len(first) == 1
    finally:
        limit(-1)
    study.file.write_text(study.file.read_text().replace("seeds: 3", "seeds: 4"))
    assert "submitted 2" in study.submit("--chain")
    second = chained()
    assert len(second) == 1 and second != first, "the one that waits has the study as it is now"


def test_chain_submits_finalists_and_writes_the_report(tmp_path: Path, mnist5k: Path) -> None:
    arms = {"AdamWR": ADAMW | {"schedule": {"name": "cosine"}}}
    study = Study(tmp_path, mnist5k, ONE, **TINY, arms=arms, finalists={"top": 1, "seeds": 1})

    assert "goes on when" in study.submit("--chain")
    first = chained()
    assert "submitted 0" in study.submit("--chain")
    assert chained() == first and len(first) == 1, "no second chain"
    page = study.store.study("mine") / "report" / "report.html"
    until(page.exists)
    assert states(study) == {("AdamWR", 0): "finished", ("AdamWR", 1000): "finished"}
    until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, check=True, timeout=60).stdout, 60)
    queued = [(one["phase"], one["attempt"]) for one in lines(study, "queued")]
    assert queued == [("search", 1), ("finalists", 1)]
    summary = json.loads((page.parent / "summary.json").read_text())
    assert not summary.get("complaints"), summary


@pytest.mark.parametrize("when", ["before anything", "between the trials and the successor"])
def test_a_chain_lives_on_where_the_controller_is_away(
    tmp_path: Path, mnist5k: Path, jobs: Cluster, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    study = Study(tmp_path, mnist5k, LATER, **TINY, search={"seeds": 2})
    away, gone = tmp_path / "away", tmp_path / "gone"
    count = f'[ "$1" = --help ] || echo call >> {tmp_path / "calls"}'
    second = f'[ "$(wc -l < {tmp_path / "calls"})" = 2 ] && touch {away} && while [ ! -e {gone} ]; do sleep 0.1; done'
    executable(tmp_path / "bin" / "sbatch", f'{count}\n[ "$1" = --help ] || {{ {second}; }}\nexec {shutil.which("sbatch")} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "99999")  # as in a chain's job
    if when == "before anything":
        jobs.stop_controller()
        away.touch()
        gone.touch()
    process = study.start("submit", "--chain")
    assert process.stderr is not None
    until(away.exists, 60)
    if when != "before anything":
        jobs.stop_controller()
        gone.touch()
    first = process.stderr.readline()
    jobs.start_controller()
    out, err = process.communicate(timeout=120)
    assert first.startswith("error: ") and process.returncode == 0 and "goes on when" in out, (first, out, err)
    assert len(study.in_queue()) == 2 and len(chained()) == 1


def test_no_secret_is_written_and_files_are_the_users_own(tmp_path: Path, mnist5k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"MLFLOW_TRACKING_TOKEN": "t0ken-d1e2f3", "MLFLOW_TRACKING_PASSWORD": "passw0rd-a1b2c3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    study = Study(tmp_path, mnist5k, ONE, **TINY)
    before = os.umask(0o077)
    try:
        study.submit()
        study.wait("finished")
        assert study.run("status")[0] == 0  # delivers to MLflow
    finally:
        os.umask(before)
    files = [path for path in study.store.root.rglob("*") if path.is_file()]
    assert study.store.root / "mlflow.db" in files
    assert not [path for path in files for secret in secrets.values() if secret.encode() in path.read_bytes()]
    modes = {path: stat.filemode(path.lstat().st_mode) for path in study.store.root.rglob("*") if not path.is_symlink()}
    assert not {path: mode for path, mode in modes.items() if mode[4:] != "------"}


def test_ranks_find_their_gpu_whichever_are_shown(tmp_path: Path, mnist5k: Path) -> None:
    """The ranks' Python says where a rank finds itself, and trains nothing."""
    say = (
        "import os; from launch.rank import place; e = place(os.environ);"
        "print('place', e['RANK'], e['WORLD_SIZE'], e['LOCAL_RANK'], os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    python = executable(tmp_path / "python", f'{sys.executable} -c "{say}"; sleep 3; exit 1')
    found = {}
    for name, arguments in (("all", []), ("own", ["--gpus-per-task=1"])):
        asked = {"tasks_per_node": 2, "gpus_per_node": 2, "max_retries": 0, "python": str(python), "srun_args": arguments}
        found[name] = Study(tmp_path / name, mnist5k, asked, name=name, ranks=4)
        found[name].submit()
    places = {}
    for name, study in found.items():
        study.wait("failed")
        said = "".join(path.read_text() for path in study.folder().logs.glob("*_log.out"))
        places[name] = sorted(line.removeprefix("place ") for line in said.splitlines())
    assert places["all"] == ["0 4 0 0,1", "1 4 1 0,1", "2 4 0 0,1", "3 4 1 0,1"]
    assert [line.split()[:3] for line in places["own"]] == [[str(rank), "4", "0"] for rank in range(4)]
    assert [line.split()[3] for line in places["own"]] == ["0", "1", "0", "1"]
