"""The command line as a process: exit statuses, messages, and what it never imports."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from harness import provenance
from harness.store import Store
from harness.study import planned
from launch import doctor
from tests.synthetic import STUDY, write_study, write_trial
from tests.trials import trial
from tests.unit.conftest import Command

HEAVY = {"torch", "mlflow", "submitit", "deepspeed", "torchvision", "pandas", "matplotlib"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def study_file(folder: Path, **over: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"name": "mine"} | over, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "plan", "nosuch"], ["study: 'nosuch' is not in configs/study", "demo"]),
        (["study", "plan", "nosuch.yaml"], ["nosuch.yaml", "no such file"]),
        (["study", "status", "demo", "--set", "budget.epochs"], ["--set 'budget.epochs'", "KEY=VALUE"]),
        (["study", "status", "demo", "--set", "budget.epoch=3"], ["budget.epoch", "epochs"]),
        (["study", "submit", "demo", "--cluster", "nowhere"], ["cluster: 'nowhere'", "local"]),
        (["study", "submit", "demo", "--set", "ranks=3"], ["global_batch_size", "100", "3 ranks"]),
        (["study", "submit", "demo", "--set", "workload.data.path=nowhere"], ["nowhere", "wrbench shards build KIND SRC --out"]),
        (["study", "submit", "demo", "--phase", "both"], ["both", "finalists"]),
        (["study", "logs", "demo", "abc"], ["'abc'", "none yet"]),
        (["study", "plan"], ["FILE"]),
        (["study", "plam", "demo"], ["plam", "plan"]),
        (["shards", "build", "mnist6k", "--out", "x"], ["mnist6k", "mnist5k"]),
        (["shards", "verify", "nowhere"], ["nowhere", "no such folder"]),
        (["study", "plan", "/dev/null"], ["/dev/null", "is not a regular file"]),
        (["study", "plan", "configs/study"], ["configs/study", "is not a regular file"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["train", "configs/study/demo.yaml"], ["arms: is of a study", "wrbench study submit configs/study/demo.yaml"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(wrbench: Command, arguments: list[str], said: list[str], store: Path) -> None:
    options = ["--store", str(store)] if arguments[0] == "study" and len(arguments) > 2 else []
    code, out, err = wrbench(*arguments, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in said), err
    assert not store.exists()


def test_an_unknown_arm_key_is_named_with_the_valid_ones(wrbench: Command, tmp_path: Path, store: Path) -> None:
    arm = {"optimizer": {"name": "adam", "lr": 0.001, "nesterov": True}, "schedule": {"name": "cosine"}}
    code, _, err = wrbench("study", "submit", study_file(tmp_path, arms={"AdamW": arm}), "--store", store)
    assert code == 2 and err.count("\n") == 1, err
    assert "arms.AdamW.optimizer.nesterov: unknown key" in err and "betas" in err
    assert not store.exists()


def test_every_mistake_has_its_line(wrbench: Command, tmp_path: Path) -> None:
    file = study_file(tmp_path, ranks=0, search={"points": 0})
    code, _, err = wrbench("study", "plan", file)
    assert code == 2 and len(err.splitlines()) == 2, err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_a_store_that_is_a_file(wrbench: Command, tmp_path: Path, mnist5k: Path) -> None:
    store = tmp_path / "runs"
    store.write_text("not a folder")
    file = study_file(tmp_path, workload={"name": "mnist5k_cnn", "data": {"path": str(mnist5k)}})
    code, _, err = wrbench("study", "submit", file, "--store", store)
    assert code == 2 and err.count("\n") == 1 and "--store" in err and "not writable" in err, err
    assert store.read_text() == "not a folder"


def test_plan_as_json_starts_nothing(wrbench: Command, store: Path) -> None:
    code, out, _ = wrbench("study", "plan", "demo", "--json", "--store", store)
    assert code == 0 and not store.exists()
    plan = json.loads(out)
    assert (plan["study"], plan["arms"]) == ("demo", ["AdamWR", "SGDWR"])
    searched, pending = ([t for t in plan["trials"] if (t["trial_id"] is None) == undecided] for undecided in (False, True))
    assert (len(searched), len(pending)) == (8, 6)
    assert {t["phase"] for t in pending} == {"finalists"}
    assert set(plan["trials"][0]) == {
        "trial_id",
        "arm",
        "seed",
        "phase",
        "steps",
        "cycle_end_epochs",
        "cycle_end_steps",
        "estimate_seconds",
    }
    assert plan["phases"] == [
        {"phase": phase, "trials": trials, "ranks": 2, "gpu_hours": None, "measured": False, "seconds_per_step": None}
        for phase, trials in (("search", 8), ("finalists", 6))
    ]
    assert [(row["seeds"], row["seed_sd"]) for row in plan["power"]] == [(3, 0.07), (3, 0.1), (3, 0.13)]
    assert {key: round(value, 3) for key, value in plan["power"][1].items()} == {
        "seeds": 3, "pairs": 1, "seed_sd": 0.1, "difference_unpaired": 0.307, "difference_paired": 0.462,
        "margin_unpaired": 0.174, "margin_paired": 0.238,
    }  # fmt: skip
    for one in searched:
        assert (one["steps"], one["cycle_end_epochs"], one["cycle_end_steps"]) == (245, [1, 3, 7], [35, 105, 245])
        assert one["estimate_seconds"] is None


def test_plan_with_the_schedule_of_every_step(wrbench: Command, store: Path) -> None:
    code, out, _ = wrbench("study", "plan", "demo", "--json", "--schedule", "--set", "search.points=1", "--store", store)
    steps = json.loads(out)["trials"][0]["steps"]
    assert code == 0 and [row["step"] for row in steps] == list(range(245))
    assert set(steps[0]) == {"step", "epoch", "cycle", "eta", "lr", "weight_decay"}
    assert [row["eta"] for row in (steps[0], steps[35], steps[70])] == pytest.approx([1, 1, 0.5])
    assert steps[70]["lr"] == pytest.approx(0.5 * steps[0]["lr"])


def test_plan_for_people_says_what_is_known_and_warns(wrbench: Command, store: Path) -> None:
    code, out, err = wrbench("study", "plan", "demo", "--set", "budget.epochs=6", "--set", "workload.data.path=nowhere", "--store", store)
    assert code == 0
    pending = [line.split() for line in out.splitlines() if "pending" in line]
    assert [line[:5] for line in pending] == [["3", "pending", arm, "finalists", "-"] for arm in ("AdamWR", "SGDWR")]
    assert "not measured yet" in out
    assert "finalists: 6 trial(s) of 2 rank(s), 1 at a time; GPU-hours of training: not measured yet" in out
    assert "3 seeds an arm, points of error: the smallest difference found with 80% power (two-sided 5%)" in out
    assert ["0.10", "0.31", "0.46", "0.17", "0.24"] in [line.split() for line in out.splitlines()]
    assert "budgets that end a cycle: 3 or 7" in err and "wrbench shards build" in err


def test_plan_counts_the_gpu_hours_of_each_phase_once_a_step_is_measured(wrbench: Command, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    loaded = write_study(store, STUDY | {"ranks": 2, "finalists": None})
    first = next(p.trial for p in planned(loaded, {}) if p.trial is not None)
    write_trial(store, first)  # of two ranks
    code, out, _ = wrbench("study", "plan", loaded.source, "--json", "--store", store.root)
    (row,) = json.loads(out)["phases"]
    assert code == 0 and row["trials"] == 8
    assert row["gpu_hours"] == pytest.approx(8 * 245 * 0.05 * 2 / 3600, rel=0.05)  # 0.05 s a step, two ranks
    code, out, _ = wrbench("study", "plan", loaded.source, "--store", store.root)
    assert code == 0 and "search: 8 trial(s) of 2 rank(s), 1 at a time; GPU-hours of training: 0.05" in out
    assert "of training (start-up and evaluation are not in it)" in out
    assert "one seed a configuration: no difference can be told from chance" in out


def test_plan_takes_a_phase_for_what_the_cluster_file_makes_of_it(wrbench: Command, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    asked = {"executor": "slurm", "time_minutes": 60, "tasks_per_node": 2}
    store = Store(tmp_path / "runs")
    loaded = write_study(store, STUDY)
    write_trial(store, next(p.trial for p in planned(loaded, {}) if p.trial is not None))  # of two ranks

    def plan(nodes: int, *options: str) -> tuple[str, str]:
        cluster.write_text(yaml.safe_dump(asked | {"overrides": {"finalists": {"nodes": nodes, "array_parallelism": 3}}}))
        code, out, err = wrbench("study", "plan", loaded.source, "--cluster", cluster, "--store", store.root, *options)
        assert code == 0, err
        return out, err

    out, err = plan(3)
    assert "warning: budget.global_batch_size: 100 is not divisible by 6 ranks" in err
    assert "search: 8 trial(s) of 2 rank(s), 8 at a time; " in out and "finalists: 10 trial(s) of 6 rank(s), 3 at a time; " in out
    assert "estimated time: not measured yet\n" in out, "of the finalists it is not"
    assert "not divisible" not in plan(2)[1]
    estimates = {t["phase"]: t["estimate_seconds"] for t in json.loads(plan(2, "--json")[0])["trials"]}
    assert estimates["search"] is not None and estimates["finalists"] is None


def test_plan_shows_the_axes_as_they_were_drawn(wrbench: Command, store: Path) -> None:
    code, out, _ = wrbench("study", "plan", "mnist5k_adamwr_vs_sgdwr", "--store", store)
    pending = [line.split() for line in out.splitlines() if " pending " in line]
    assert code == 0 and sum(int(line[0]) for line in pending) == 96 and len({line[2] for line in pending}) == len(pending)
    line = next(line for line in out.splitlines() if " AdamWR-eps.narrow " in line)
    assert re.search(
        r"optimizer\.effective_lr [\d.]+, optimizer\.eps [\d.e-]+, optimizer\.one_minus_beta1 0\.\d+, decay\.weight_decay", line
    )


def test_dry_run_needs_no_data_and_writes_nothing(wrbench: Command, store: Path) -> None:
    code, out, err = wrbench("study", "submit", "demo", "--dry-run", "--set", "workload.data.path=nowhere", "--store", store)
    assert code == 0 and not store.exists()
    assert (out.count("submit "), out.count("later ")) == (8, 6)
    assert "wrbench shards build" in err


def test_status_of_a_study_in_the_store(wrbench: Command, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    loaded = write_study(store, STUDY | {"search": {"points": 1, "seeds": 1}})
    first = next(p.trial for p in planned(loaded, {}) if p.trial is not None)
    write_trial(store, first, "failed")
    code, out, err = wrbench("study", "status", loaded.source, "--json", "--store", store.root)
    assert code == 0, err
    document = json.loads(out)
    assert document["study"] == "synthetic"
    row = document["trials"][0]
    keys = {"trial_id", "arm", "seed", "phase", "state", "step", "total_steps", "attempts", "job_id", "run_id", "last_error"}
    assert keys <= set(row)
    assert (row["trial_id"], row["state"], row["total_steps"], row["attempts"]) == (first.trial_id, "failed", 245, 1)
    code, out, _ = wrbench("study", "status", loaded.source, "--store", store.root)
    assert code == 0 and "1 failed" in out.splitlines()[-1]


def test_a_study_goes_by_its_name_in_the_store_unless_configs_has_that_name(wrbench: Command, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for name in ("mine", "demo"):
        write_study(store, STUDY | {"name": name, "search": {"points": 1, "seeds": 1}})
    arms = {}
    for name in ("mine", "demo"):
        code, out, err = wrbench("study", "plan", name, "--json", "--store", store.root)
        assert code == 0, err
        arms[name] = [one["phase"] for one in json.loads(out)["trials"]].count("search")
    assert arms == {"mine": 2, "demo": 8}
    for asked in (["plan", "mine"], ["plan", str(tmp_path / "runs" / "mine"), "--store", store.root]):
        code, out, err = wrbench("study", *asked)
        assert (code, out) == (2, "") and err.startswith("error: study: ") and err.count("\n") == 1


def test_a_guess_of_the_workload_is_told_from_what_is_not_known(wrbench: Command, store: Path) -> None:
    _, out, _ = wrbench("study", "plan", "imagenet_adamwr_vs_sgdwr", "--store", store)
    assert "estimated time: not measured yet, GPU-hours by the workload's guess\n" in out and out.count("not measured yet") == 1


def test_train_refuses_missing_shards_before_it_writes(wrbench: Command, tmp_path: Path, store: Path) -> None:
    file = tmp_path / "trial.yaml"
    document = trial().model_dump(mode="json", exclude_unset=True)
    document["workload"]["data"]["path"] = str(tmp_path / "nowhere")
    file.write_text(yaml.safe_dump(document))
    code, _, err = wrbench("train", file, "--store", store)
    assert code == 2 and err.count("\n") == 1 and "wrbench shards build" in err, err
    assert not list(store.glob("*"))


def test_verify_names_a_truncated_shard_and_exits_1(wrbench: Command, tmp_path: Path, mnist5k: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mnist5k, broken)
    shard = sorted(broken.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    code, out, err = wrbench("shards", "verify", broken)
    assert code == 1 and shard.name in err and err.startswith("error: "), err
    assert " fault(s), 0 warning(s)" in out


def test_looking_imports_nothing_heavy_and_exit_statuses_reach_the_shell(tmp_path: Path, mnist5k: Path) -> None:
    store = str(tmp_path / "runs")
    looks = (
        ["plan", "demo", "--json"],
        ["plan", "demo"],
        ["status", "demo", "--json"],
        ["submit", "demo", "--dry-run"],
        ["logs", "demo", "x"],
    )
    code = f"""
import sys
from launch.__main__ import app, run
for look in {looks!r}:
    sys.argv = ["wrbench", "study", *look, "--store", {store!r}]
    status = run(app)
    heavy = {HEAVY!r} & set(sys.modules)
    assert not heavy, (look, heavy)
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: TRIAL: 'x'")


@pytest.mark.parametrize("arguments", [[], ["shards"]])
def test_without_arguments_help_is_shown(wrbench: Command, arguments: list[str]) -> None:
    code, out, err = wrbench(*arguments)
    assert (code, err) == (2, "")
    assert "Usage: wrbench" in out and ("verify" if arguments else "study") in out


def test_the_version_names_the_commit(wrbench: Command) -> None:
    code, out, err = wrbench("--version")
    assert (code, err) == (0, "")
    assert out == f"wrbench {provenance.version('wrbench')}, commit {provenance.code()['commit']}\n"


def test_a_path_that_the_terminal_cannot_show_ends_no_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "study", "status", "demo", "--store", str(tmp_path / "n\u00f6")]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "n\\xf6" in done.stdout


@pytest.mark.parametrize("uid", [0, 1000])
def test_the_notebook_runs_as_root(wrbench: Command, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    """Jupyter refuses to, unless it is told."""
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert wrbench("notebook")[0] == 0
    assert ("--allow-root" in started[0]) == (uid == 0)


@pytest.mark.parametrize(
    ("uri", "ok", "said"),
    [("foo://bar", False, "does not know"), ("mysql://ann:s3cret@nowhere/db", True, "mysql://***@nowhere/db: not tried")],
)
def test_the_doctor_claims_nothing_of_a_tracking_store_that_it_did_not_try(
    store: Path, monkeypatch: pytest.MonkeyPatch, uri: str, ok: bool, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    finding = doctor._tracking(Store(store))
    assert finding.ok == ok and said in finding.text
    assert not store.exists()


def test_the_doctor_sees_bytecode_that_python_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by Python itself: `-v` says of a module what its code came from."""
    package = tmp_path / "torch"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("VALUE = 1\n")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(source)))

    def is_taken() -> bool:
        command = [sys.executable, "-B", "-v", "-c", "import torch"]
        said = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True).stderr
        return f"code object from '{importlib.util.cache_from_source(str(source))}'" in said

    def found() -> bool:
        (finding,) = doctor._bytecode()
        assert finding.ok or f"unchecked-hash {tmp_path}" in finding.fix
        return finding.ok

    assert (is_taken(), found()) == (False, False)
    py_compile.compile(str(source))
    assert (is_taken(), found()) == (True, True)
    os.utime(source, (1, 1))  # what a copy without dates does
    assert (is_taken(), found()) == (False, False)
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    os.utime(source, (2, 2))
    assert (is_taken(), found()) == (True, True)


def test_the_doctor_says_whether_triton_makes_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, which this one need not be."""
    answers = {doctor._TORCH: ({"version": "2.11.0", "build": "CUDA 13.0", "gpus": ["H100"]}, "")}
    for found, complaint, ok in (({"version": "3.6.0"}, "", True), (None, "Failed to find C compiler.", False)):
        monkeypatch.setattr(doctor, "_probe", (answers | {doctor._KERNELS: (found, complaint)}).get)
        finding = list(doctor._torch())[-1]
        assert (finding.name, finding.ok, complaint in finding.text) == ("triton", ok, True)
        assert bool(finding.fix) is not ok
