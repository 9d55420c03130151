"""One trial on real digits: exact through kills, stops, sharding and world sizes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import checkpoint, journal, models, optim
from harness.config import BadInput, Trial
from harness.correct import correct
from harness.data import decode, loader
from harness.stopping import StopRequest
from harness.store import Store, TrialFolder
from harness.train import train
from tests import reference
from tests.integration.ranks import SUPERSEDED, Ranks, finish, history
from tests.trials import Told, trial
from tests.unit.test_optim import control, reference_lambda

SGDW = {"optimizer": {"name": "sgd", "lr": 0.05}, "decay": {"name": "decoupled", "weight_decay": 0.1, "normalised": True}}
ADAMW = {"optimizer": {"name": "adam", "lr": 0.003}, "decay": {"name": "decoupled", "weight_decay": 0.1, "normalised": True}}
FEW = {"name": "few", "train_samples": 800, "holdout_per_class": 10, "val_samples": 200}


def small(path: Path, **over: Any) -> Trial:
    """21 steps of 100 in three cycles of 3, 6 and 12 steps; a checkpoint every epoch of 7 steps and at cycle ends."""
    return trial(
        **{
            "data": FEW | {"path": str(path)}, "recipe": {"translate": 2},
            "budget": {"epochs": 3, "global_batch_size": 100},
            "schedule": {"name": "cosine_restarts", "t_0": 3 / 7, "t_mult": 2},
            "evaluation": {"log_every_steps": 1, "batch_size": 100, "train_eval_samples": 50},
        } | over
    )  # fmt: skip


def test_a_trial_learns_and_its_record_is_whole(tmp_path: Path, mnist5k: Path) -> None:
    t = trial(
        data={"path": str(mnist5k)}, budget={"epochs": 3, "global_batch_size": 100}, **ADAMW,
        evaluation={"every_epochs": 0.5, "log_every_steps": 5, "batch_size": 250},
    )  # fmt: skip
    store = Store(tmp_path)
    result = train(t, store)
    folder = store.trial(t.study, t.trial_id)
    assert result == json.loads(folder.result.read_text())
    assert (result["state"], result["step"], result["total_steps"], result["attempts"]) == ("finished", 105, 105, 1)
    assert result["metrics"]["val/top1"] > 0.9
    assert result["metrics"]["anytime/val_top1"] == result["metrics"]["val/top1"]  # the budget ends a cycle
    points = history(folder)
    steps = lambda metric: sorted(s for m, s in points if m == metric)  # noqa: E731
    evaluated = [round(e * 35) - 1 for e in (0.5, 1, 1.5, 2, 2.5, 3)]
    assert steps("train/loss") == sorted({*range(4, 105, 5), *evaluated})
    assert steps("holdout/top1") == steps("val/loss") == evaluated
    assert steps("train_eval/loss") == steps("weights/norm") == steps("adam/v_below_eps") == [34, 104]  # cycle ends 35 and 105
    assert steps("anytime/holdout_top1")[0] == 34  # nothing before a first cycle has ended
    assert points["anytime/holdout_top1", 69] == points["holdout/top1", 34]
    assert 0 < points["weights/update_ratio", 104] < points["weights/update_ratio", 34] < 1
    assert folder.state().state == "finished"
    (start,) = journal.fold(journal.read(folder.journal)).starts
    assert start["torch"] == torch.__version__ and start["python"].startswith("3.") and start["deepspeed"][0].isdigit()
    assert start["code"] is None, "not run from a snapshot"
    lines = [(line.get("event", "metrics"), line["step"]) for line in journal.read(folder.journal)]
    before_the_next_save = [lines.index(("checkpoint", done)) < lines.index(("metrics", done + 34)) for done in (35, 70)]
    assert any(before_the_next_save), "committed while training went on"
    assert train(t, store)["attempts"] == 1, "a finished trial is not trained again"


@pytest.mark.parametrize("result", ["kept", "lost"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_journal_that_was_cut_is_not_believed(tmp_path: Path, few: Path, damage: str, result: str) -> None:
    """Else the checkpoint at the end would make a result of whatever answer the journal still has."""
    t = small(few, **ADAMW)
    calm = train(t, Store(tmp_path / "calm"))
    train(t, store := Store(tmp_path / "damaged"))
    folder = store.trial(t.study, t.trial_id)
    text = folder.journal.read_bytes()
    folder.journal.write_bytes(text[: len(text) // 2] if damage == "cut" else b"\x80" * len(text))
    if result == "lost":
        folder.result.unlink()
    again = train(t, store)
    assert (again["state"], again["weights_sha256"], again["attempts"]) == ("finished", calm["weights_sha256"], 2)
    timed = ("time/", "speed/", "data/wait")
    assert {k: v for k, v in again["metrics"].items() if not k.startswith(timed)} == {
        k: v for k, v in calm["metrics"].items() if not k.startswith(timed)
    }
    record = journal.fold(journal.read(folder.journal))
    assert record.starts[-1]["resumed_from"] < 21
    (first, *_) = [line for line in record.warnings if "is passed over" in line]
    assert first.startswith("checkpoint step-21-attempt-1 is passed over: journal.jsonl ends at step ")
    assert folder.state().state == "finished"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_finalist_keeps_which_images_it_has_right_whatever_the_number_of_ranks(
    tmp_path: Path, few: Path, mnist5k: Path, world: int
) -> None:
    """Bit by bit in the order of the index, as the kept weights say in one process; their mean is the metric, exactly."""
    test = {"name": "digits", "path": str(mnist5k), "samples": 1000}
    evaluation = {"log_every_steps": 1, "batch_size": 30, "train_eval_samples": 50, "every_epochs": 1, "test": test}
    t = small(few, **ADAMW, phase="finalists", evaluation=evaluation, budget={"epochs": 3, "global_batch_size": 96})  # 7 x 3 steps
    store = Store(tmp_path)
    metrics = finish(t, store, world)["metrics"]
    folder, points = store.trial(t.study, t.trial_id), history(store.trial(t.study, t.trial_id))
    assert {step for metric, step in points if metric.startswith("test/")} == {20}, "once"
    assert metrics["anytime/test_top1"] == metrics["test/top1"] and {"test/top5", "test/loss"} <= metrics.keys()
    (start,) = journal.fold(journal.read(folder.journal)).starts
    opened = loader.open_data(t.workload.data, test=t.evaluation.test)
    assert {key: start[key] for key in ("data_sha256", "test_sha256")} == opened.sha256()
    model = models.build(t.workload, 0)
    model.load_state_dict(torch.load(folder.weights / "step-21.pt", weights_only=True))
    model.eval()
    for split, view in (("val", opened.val), ("test", opened.test)):
        bits = correct(folder, split)
        assert view is not None and bits is not None and bits.shape == (len(view),)
        assert bits.mean() == metrics[f"{split}/top1"] == points[f"{split}/top1", 20]
        ((images, labels),) = loader.eval_batches(view, 0, 1, 1000)
        with torch.no_grad():
            logits = model(images)
        sure = (logits.topk(2).values.diff().abs() > 1e-4).flatten().numpy()  # where rounding does not decide
        assert sure.mean() > 0.99 and 0.3 < bits.mean() < 1
        assert (bits == (logits.argmax(1) == labels).numpy())[sure].all()
        with np.load(folder.correct / f"{split}.npz", allow_pickle=False) as archive:
            assert archive["step"] == 20


def test_the_bits_are_those_of_the_answer_that_is_reported(tmp_path: Path, few: Path) -> None:
    """A budget that cuts the last cycle: the answer is that of the cycle before, and so are the bits."""
    t = small(few, **ADAMW, phase="finalists", budget={"epochs": 2, "global_batch_size": 100})  # cycles end after 3 and 9 steps of 14
    metrics = train(t, store := Store(tmp_path))["metrics"]
    bits = correct(store.trial(t.study, t.trial_id), "val")
    assert bits is not None and bits.mean() == metrics["anytime/val_top1"] != metrics["val/top1"]


def test_a_searched_point_is_not_validated(tmp_path: Path, few: Path, mnist5k: Path) -> None:
    test = {"name": "digits", "path": str(mnist5k), "samples": 1000}
    t = small(few, **ADAMW, evaluation={"batch_size": 100, "train_eval_samples": 50, "val": False, "test": test})
    metrics = train(t, store := Store(tmp_path))["metrics"]
    assert {"holdout/top1", "anytime/holdout_top1", "train_eval/loss"} <= metrics.keys()
    assert not {"val", "test"} & {name.removeprefix("anytime/").replace("/", "_").partition("_")[0] for name in metrics}
    folder = store.trial(t.study, t.trial_id)
    assert not folder.correct.exists() and correct(folder, "val") is None
    assert folder.state().state == "finished"


@pytest.mark.parametrize(
    ("arm", "stage", "world"), [(SGDW, 0, 2), (ADAMW, 1, 2), (ADAMW, 0, 3)], ids=["sgdw-ddp", "adamw-zero1", "adamw-ddp-3"]
)
def test_kill_9_of_any_rank_at_any_step_leaves_no_trace(tmp_path: Path, few: Path, arm: dict[str, Any], stage: int, world: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    t = small(few, **arm, backend={"zero_stage": stage}, **({"budget": {"epochs": 3, "global_batch_size": 99}} if world == 3 else {}))
    undisturbed = finish(t, calm := Store(tmp_path / "calm"), world)
    store = Store(tmp_path / "killed")
    folder = store.trial(t.study, t.trial_id)
    for _ in range(2):
        ranks = Ranks(t, store, world)
        ranks.wait_for_step(rng.randrange(journal.fold(journal.read(folder.journal)).committed + 1, 20))
        ranks.signal(rng.randrange(world), signal.SIGKILL)
        assert 0 not in ranks.wait(60), "the survivors of a killed rank end within a minute"
        assert folder.state().state == "interrupted"
    result = finish(t, store, world)
    assert result["attempts"] == 3
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))


def test_told_to_stop_all_ranks_save_together_and_no_step_is_repeated(tmp_path: Path, few: Path) -> None:
    t = small(few, **SGDW, checkpoint={"every_epochs": 3})
    undisturbed = finish(t, calm := Store(tmp_path / "calm"), 2)
    store = Store(tmp_path / "stopped")
    folder = store.trial(t.study, t.trial_id)
    ranks = Ranks(t, store, 2)
    ranks.wait_for_step(11)
    ranks.signal(1, signal.SIGTERM)  # one rank alone is told
    assert ranks.wait(60) == [3, 3], ranks.errors()
    assert folder.state().state == "interrupted"
    stopped_at = folder.state().step
    assert checkpoint.found(folder)[0][0] == stopped_at
    result = finish(t, store, 2)
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))
    lines = [line["step"] for line in journal.read(folder.journal) if "train/loss" in line.get("metrics", {})]
    assert lines == list(range(21))


def test_told_to_stop_before_it_began_it_saves_what_it_has_at_the_first_chance(tmp_path: Path, few: Path) -> None:
    """As a rank of SLURM that listens before it imports torch."""
    t, store = small(few, **SGDW), Store(tmp_path)
    with StopRequest("USR1") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        result = train(t, store, stop=stop)
    assert (result["state"], result["step"]) == ("interrupted", 1)
    state = store.trial(t.study, t.trial_id).state()
    assert (state.state, state.step, state.committed, state.stopped) == ("interrupted", 1, 1, True)
    assert train(t, store)["state"] == "finished"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative Euclidean distance of all weights."""
    flat_a, flat_b = (torch.cat([state[k].flatten() for k in sorted(b)]) for state in (a, b))
    return float(torch.linalg.norm(flat_a - flat_b) / torch.linalg.norm(flat_b))


def test_world_size_sharding_and_accumulation_change_rounding_only(tmp_path: Path, few: Path) -> None:
    """The same global batches and sums of the same terms, in fp64, where rounding is 1e-16 a step.

    Limit 1e-9 relative, over all weights: Adam's first steps divide by tiny second moments, which amplifies the order of
    sums (to 1e-3 in fp32, 1e-12 here) but stays far from what a wrong batch, decay or lr does.
    """
    states = {}
    for name, world, backend in (
        ("one", 1, {}), ("accumulated", 1, {"micro_batch_size": 25}), ("two", 2, {}), ("zero1", 2, {"zero_stage": 1, "micro_batch_size": 25}),
    ):  # fmt: skip
        t = small(few, **ADAMW, backend=backend, recipe={"precision": "fp64", "translate": 2})
        store = Store(tmp_path / name)
        finish(t, store, world)
        folder = store.trial(t.study, t.trial_id)
        saved, complaints = checkpoint.newest(folder, t.trial_id)
        assert saved is not None
        assert complaints == []
        states[name] = (saved.load("model.pt"), saved.optimizer_state(), history(folder))
    weights, moments, points = states["one"]
    for name, (other, other_moments, other_points) in states.items():
        assert distance(other, weights) <= 1e-9, name
        assert other_moments.keys() == moments.keys() == weights.keys()
        assert other_points.keys() == points.keys()
        assert other_points["val/top1", 20] == points["val/top1", 20]
        assert other_points["val/loss", 20] == pytest.approx(points["val/loss", 20], rel=1e-9)


def test_a_checkpoint_moves_between_world_sizes_and_stages(tmp_path: Path, few: Path) -> None:
    ends = {}
    for name, worlds in (("2-2", (2, 2)), ("2-1", (2, 1)), ("1-2", (1, 2))):
        store = Store(tmp_path / name)
        for i, world in enumerate(worlds):
            t = small(few, **ADAMW, backend={"zero_stage": 1}, recipe={"precision": "fp64"})
            ranks = Ranks(t, store, world)
            if i == 0:
                ranks.wait_for_step(12)
                for p in ranks.processes:
                    p.kill()
            ranks.wait()
        saved, _ = checkpoint.newest(store.trial(t.study, t.trial_id), t.trial_id)
        assert saved is not None
        assert saved.step == 21
        ends[name] = saved.load("model.pt")
    for other in ("2-1", "1-2"):
        assert distance(ends[other], ends["2-2"]) <= 1e-9, other


COMBINATIONS = [
    ({"name": "sgd", "lr": 0.02}, {"name": "none"}),
    ({"name": "sgd", "lr": 0.02}, {"name": "l2", "weight_decay": 0.01, "exempt_1d": True}),
    ({"name": "sgd", "lr": 0.02}, {"name": "decoupled", "weight_decay": 0.001}),
    ({"name": "sgd", "lr": 0.02}, {"name": "decoupled", "weight_decay": 0.1, "units": "torch"}),
    ({"name": "sgd", "lr": 0.02}, {"name": "decoupled", "weight_decay": 0.1, "normalised": True}),
    ({"name": "sgd", "lr": 0.02, "lr_in_buffer": True}, {"name": "l2", "weight_decay": 0.01}),
    ({"name": "sgd", "lr": 0.02, "lr_in_buffer": True}, {"name": "decoupled", "weight_decay": 0.1, "normalised": True}),
    ({"name": "adam", "lr": 0.002}, {"name": "none"}),
    ({"name": "adam", "lr": 0.002}, {"name": "l2", "weight_decay": 0.01}),
    ({"name": "adam", "lr": 0.002}, {"name": "decoupled", "weight_decay": 0.001}),
    ({"name": "adam", "lr": 0.002}, {"name": "decoupled", "weight_decay": 0.1, "units": "torch"}),
    ({"name": "adam", "lr": 0.002}, {"name": "decoupled", "weight_decay": 0.1, "normalised": True, "exempt_1d": True}),
]


@pytest.mark.parametrize(("optimizer", "decay"), COMBINATIONS)
def test_train_itself_equals_the_reference(
    tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], decay: dict[str, Any]
) -> None:
    """float64, 200 steps over five restarts, driven by train(): the gradients it saw, through the NumPy reference."""
    t = trial(
        data=FEW | {"path": str(few)}, recipe={"precision": "fp64", "translate": 2}, optimizer=optimizer, decay=decay,
        budget={"epochs": 200 / 116, "global_batch_size": 6}, schedule={"name": "cosine_restarts", "t_0": 6 / 116, "t_mult": 2},
        evaluation={"batch_size": 100, "train_eval_samples": 10},
    )  # fmt: skip
    slow = control(t)
    exempt = getattr(t.decay, "exempt_1d", False)
    theta: dict[str, np.ndarray] = {}
    parameters: list[torch.Tensor] = []
    count = 0
    write = optim.write

    def observed(built: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
        """Stands where train() hands lr and decay over, just before the step: the gradients are those of the step."""
        nonlocal count
        parameters[:] = [p for group in built.param_groups for p in group["params"]]
        if not theta:
            theta.update({str(i): p.detach().numpy().copy() for i, p in enumerate(parameters)})
        eta, _, full = reference.eta_cosine_restarts(count, 116, 6 / 116, 2, 0.0)
        lam = reference_lambda(t, full)
        grads = {str(i): p.grad.numpy().copy() for i, p in enumerate(parameters) if p.grad is not None}
        slow.step(theta, grads, eta, {k: 0.0 if exempt and theta[k].ndim <= 1 else lam for k in theta})
        count += 1
        write(built, lr, weight_decay)

    monkeypatch.setattr(optim, "write", observed)
    result = train(t, Store(tmp_path))
    assert (result["state"], count) == ("finished", 200)
    for i, parameter in enumerate(parameters):
        ours = parameter.detach().numpy()
        assert np.linalg.norm(ours - theta[str(i)]) < 1e-12 * np.linalg.norm(theta[str(i)])


def test_another_decoder_than_before_is_warned_of(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t, store, stop = small(few), Store(tmp_path), Told(0)
    folder = store.trial(t.study, t.trial_id)
    for decoder, warnings in ((decode.decoder, 0), (decode.decoder, 0), ("another", 1)):
        monkeypatch.setattr(decode, "decoder", decoder)
        assert train(t, store, stop=stop)["state"] == "interrupted"
        assert sum("decoder was" in w for w in journal.fold(journal.read(folder.journal)).warnings) == warnings


def test_a_damaged_checkpoint_is_passed_over_and_nothing_is_doubled(tmp_path: Path, few: Path) -> None:
    t = small(few, **SGDW)
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    store = Store(tmp_path / "damaged")
    folder = store.trial(t.study, t.trial_id)
    ranks = Ranks(t, store, 1)
    ranks.wait_for_step(15)
    ranks.processes[0].kill()
    ranks.wait()
    newest = checkpoint.found(folder)[0]
    weights = newest[2] / "model.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = train(t, store)
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))
    assert any("is damaged" in w and newest[2].name in w for w in journal.fold(journal.read(folder.journal)).warnings)


def test_an_older_attempt_commits_nothing_once_a_newer_one_has_started(tmp_path: Path, few: Path) -> None:
    t = small(few, **SGDW, budget={"epochs": 30, "global_batch_size": 100})
    store = Store(tmp_path)
    ranks = Ranks(t, store, 2)
    ranks.wait_for_step(10)
    folder = store.trial(t.study, t.trial_id)
    newer = folder.claim()  # as another node would, which cannot see this one's lock
    committed = {path.name for _, _, path in checkpoint.found(folder)}
    assert 0 not in ranks.wait(60)
    late = {path.name for _, _, path in checkpoint.found(folder)} - committed
    assert len(late) <= 1, "only one that was being committed at that moment"
    assert not list(folder.checkpoints.glob(".*")), "what was being written is removed"
    assert folder.state().state == "interrupted"
    assert newer == 2


def long(few: Path, every_epochs: float = 30, **backend: Any) -> Trial:
    """210 slow steps of five micro-batches, in a cycle of 3 and one that is cut off; saved at 3 and, left to itself, at 210 only."""
    return small(
        few, **SGDW, backend={"micro_batch_size": 10} | backend, budget={"epochs": 30, "global_batch_size": 100},
        schedule={"name": "cosine_restarts", "t_0": 3 / 7, "t_mult": 100}, checkpoint={"every_epochs": every_epochs, "keep": 90},
    )  # fmt: skip


@pytest.fixture(scope="module")
def calm_ddp(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    finish(long(few), store := Store(tmp_path_factory.mktemp("calm")), 2)
    return store


def _left_over(folder: TrialFolder, t: Trial, calm: Store) -> None:
    """What holds after any split brain: as if only one attempt at a time had ever run."""
    resumed = [line["resumed_from"] for line in journal.fold(journal.read(folder.journal)).starts]
    assert 0 < resumed[1] < 210
    for step, attempt, _ in checkpoint.found(folder):
        assert attempt == 2 or step <= resumed[1], "the older attempt committed nothing after the newer one had begun"
    assert not list(folder.checkpoints.glob(".*"))
    lines = [line for line in journal.read(folder.journal) if line.get("event") in ("end", "stop")]
    assert [(line["attempt"], line["event"]) for line in lines] == [(2, "end")]
    result, undisturbed = (json.loads(f.result.read_text()) for f in (folder, calm.trial(t.study, t.trial_id)))
    assert (result["state"], result["attempts"]) == ("finished", 2)
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))
    assert {step for metric, step in history(folder) if metric == "train/loss"} == set(range(210))


@pytest.mark.parametrize(
    ("every_epochs", "backend"),
    [(30, {}), (1, {"name": "deepspeed", "zero_stage": 1})],
    ids=["ddp-saves-rarely", "deepspeed-1-saves-often"],
)
def test_an_attempt_that_takes_over_makes_the_older_one_leave(
    tmp_path: Path, few: Path, calm_ddp: Store, every_epochs: float, backend: dict[str, Any]
) -> None:
    """A node cut off: its ranks live on, and the scheduler has started the trial elsewhere."""
    t, calm = long(few, every_epochs, **backend), calm_ddp
    if backend:
        finish(t, calm := Store(tmp_path / "calm"), 2)
    store = Store(tmp_path / "split")
    folder = store.trial(t.study, t.trial_id)
    older = Ranks(t, store, 2)
    older.wait_for_step(20)
    with pytest.raises(BadInput, match="an attempt is running already"):
        train(t, store)  # who does not know better does not take over
    assert folder.newest_attempt() == 1
    newer = Ranks(t, store, 2, takes_over=True)
    while folder.newest_attempt() < 2:
        assert newer.processes[0].exitcode is None, newer.errors()
        time.sleep(0.01)
    assert older.wait(10) == [SUPERSEDED] * 2, older.errors()
    left_at = {int(step) for step in re.findall(r"attempt 1 stops at step (\d+)", older.errors())}
    assert len(left_at) == 1 and left_at < set(range(210)), "all together, and not because they were done"
    assert not folder.result.exists()
    assert newer.wait() == [0, 0], newer.errors()
    _left_over(folder, t, calm)


def test_an_older_attempt_that_is_stopped_and_continued_changes_nothing(tmp_path: Path, few: Path, calm_ddp: Store) -> None:
    """SIGSTOP: it holds the lock and cannot leave. The newer attempt waits for half of timeout_seconds, and goes on."""
    t, store = long(few, timeout_seconds=14), Store(tmp_path)
    folder = store.trial(t.study, t.trial_id)
    older = Ranks(t, store, 2)
    older.wait_for_step(20)
    older.signal_all(signal.SIGSTOP)
    newer = Ranks(t, store, 2, takes_over=True)
    try:
        newer.wait_for_step(40)
    finally:
        older.signal_all(signal.SIGCONT)
    assert older.wait(10) == [SUPERSEDED] * 2, older.errors()
    assert not folder.result.exists()
    while not folder.is_running():  # the newer one takes the lock that is free now
        assert newer.processes[0].exitcode is None, newer.errors()
        time.sleep(0.01)
    assert newer.wait() == [0, 0], newer.errors()
    assert not folder.is_running()
    _left_over(folder, t, calm_ddp)


@pytest.mark.parametrize(
    ("lr", "what"), [(1e30, "[a-z_]+/(loss|norm|update_ratio)"), (3e38, "[a-z_/.0-9]+")], ids=["evaluation", "weights"]
)
def test_a_last_update_that_breaks_the_weights_is_a_divergence_too(tmp_path: Path, few: Path, lr: float, what: str) -> None:
    """No loss comes after it: with one step in all, every loss is finite."""
    t = small(few, optimizer={"name": "sgd", "lr": lr}, decay={"name": "none"}, budget={"epochs": 1 / 7, "global_batch_size": 100},
              schedule={"name": "constant"})  # fmt: skip
    store = Store(tmp_path)
    result = train(t, store)
    assert (result["state"], result["step"], result["total_steps"], result["weights_sha256"]) == ("diverged", 1, 1, None)
    assert re.fullmatch(f"{what} is not finite after the last step, 0", str(store.trial(t.study, t.trial_id).state().last_error))
    assert math.isfinite(history(store.trial(t.study, t.trial_id))["train/loss", 0])


@pytest.mark.parametrize(
    ("phase", "weights", "steps"), [("finalists", "finalists", {3, 9, 21}), ("search", "finalists", set()), ("search", "all", {3, 9, 21})]
)
def test_what_remains_of_a_finished_trial(tmp_path: Path, few: Path, phase: str, weights: str, steps: set[int]) -> None:
    """Killed on its way, and with the leavings of attempts that were killed while they saved."""
    t = small(few, **ADAMW, phase=phase, checkpoint={"weights": weights})
    store = Store(tmp_path)
    folder = store.trial(t.study, t.trial_id)
    ranks = Ranks(t, store, 2)
    ranks.wait_for_step(17)
    ranks.signal_all(signal.SIGKILL)
    ranks.wait()
    assert len(checkpoint.found(folder)) <= 3, "two, and one just committed"
    (folder.checkpoints / ".step-20-attempt-1").mkdir(parents=True)
    result = finish(t, store, 2)
    assert [step for step, _, _ in checkpoint.found(folder)] == [21, 14]
    assert len(list(folder.checkpoints.iterdir())) == 2
    assert {p.name for p in folder.weights.glob("*")} == {f"step-{step}.pt" for step in steps}
    if steps:
        last = torch.load(folder.weights / "step-21.pt", weights_only=True)
        assert checkpoint.weights_sha256(last) == result["weights_sha256"]
        model = models.build(t.workload, t.seed)
        for path in folder.weights.iterdir():
            model.load_state_dict(torch.load(path, weights_only=True))


def test_a_non_finite_loss_is_a_result(tmp_path: Path, few: Path) -> None:
    t = small(few, optimizer={"name": "sgd", "lr": 1e30}, decay={"name": "none"})
    store = Store(tmp_path)
    result = train(t, store)
    assert result["state"] == "diverged"
    assert store.results(t.study) == {t.trial_id: None}
    assert "train/loss is" in str(store.trial(t.study, t.trial_id).state().last_error)


def test_a_failure_says_so_and_can_be_run_again(tmp_path: Path, few: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(few, broken)
    shard = next(broken.glob("val-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-4096])
    t = small(broken, **SGDW)
    store = Store(tmp_path / "runs")
    with pytest.raises(ValueError, match=shard.name):
        train(t, store)
    state = store.trial(t.study, t.trial_id).state()
    assert state.state == "failed"
    assert shard.name in str(state.last_error)
    assert json.loads(store.trial(t.study, t.trial_id).result.read_text())["state"] == "failed"
    again = train(small(few, **SGDW), store)
    assert (again["state"], again["attempts"]) == ("finished", 2)


@pytest.mark.parametrize("recipe", [{"label_smoothing": 0.2}, {"precision": "bf16"}])
def test_recipes_train(tmp_path: Path, few: Path, recipe: dict[str, Any]) -> None:
    plain = train(small(few, **ADAMW), Store(tmp_path / "plain"))
    other = train(small(few, **ADAMW, recipe={"translate": 2} | recipe), Store(tmp_path / "other"))
    assert other["weights_sha256"] != plain["weights_sha256"]
    assert other["metrics"]["val/top1"] > 0.5
    assert other["metrics"]["train/loss"] == pytest.approx(other["metrics"]["train_eval/loss"], abs=0.6)
