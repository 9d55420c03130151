"""`train(trial)`: build, loop, evaluate. One trial, on this process and its peers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from harness import checkpoint, eager, engine, numerics, optim
from harness.attempt import Attempt, Progress
from harness.config import Trial
from harness.data import loader, order
from harness.dist import Ranks, joined
from harness.evaluate import Evaluated, evaluate
from harness.schedule import checkpoints, cycle_ends, evaluations, resets_moments, schedule, steps_per_epoch, total_steps
from harness.speed import Clock
from harness.stopping import StopRequest
from harness.store import Store


def train(trial: Trial, store: Store, stop: StopRequest | None = None, takes_over: bool = False) -> dict[str, Any]:
    """Trains to the end of the budget from the newest checkpoint; the mapping of result.json, the same on every rank.

    Its state is finished, diverged (a non-finite loss: a result) or interrupted (told to stop, and saved). Raises what
    went wrong otherwise, after the journal says so; run again, it continues. `stop`, entered by the caller, may have been
    raised before; left out, train listens itself. With `takes_over` an attempt that still runs is told to leave, and
    raises Superseded; without, this one is refused.
    """
    folder = store.trial(trial.study, trial.trial_id)
    if (ended := folder.finished_result()) is not None:
        return ended
    with (
        joined(trial.backend.timeout_seconds) as ranks,
        numerics.switched(trial.backend),
        eager.without_compiler(trial.backend.compile),
        nullcontext(stop) if stop else StopRequest() as stop,
        Attempt(trial, folder, ranks, takes_over) as attempt,
    ):
        recipe = trial.workload.recipe
        test = trial.evaluation.test if trial.phase == "finalists" else None
        data = loader.open_data(trial.workload.data, recipe, test=test)
        worker = engine.build(trial, ranks)
        resumed = attempt.resume(worker, **data.sha256())
        clock, answer = Clock(trial, ranks, resumed.train_seconds, resumed.wait_seconds), resumed.answer
        total, ends, evaluated, saves = total_steps(trial), set(cycle_ends(trial)), evaluations(trial), checkpoints(trial)
        read = loader.train_batches(data, trial, ranks.rank, ranks.world_size, resumed.steps_done, total)
        batches = loader.on_device(read, ranks.device, clock.waiting)
        measured: dict[str, float] = {}

        for step in range(resumed.steps_done, total):
            done = step + 1
            eta, cycle, lam = schedule(trial, step)
            lr, weight_decay = optim.hyperparameters(trial.optimizer, trial.decay, eta, lam)
            images, labels = next(batches)
            if resets_moments(trial, step):
                worker.reset_moments()
            mix = order.mixing(trial.seed, step, recipe.mixup, recipe.cutmix, images.shape[-1])
            result = worker.train_step(images, labels, lr=lr, weight_decay=weight_decay, step=step, mix=mix, measure=done in ends)
            clock.step_done(images.shape[-1])

            stopping = False
            if done % trial.evaluation.log_every_steps == 0 or done in evaluated | saves:
                own = [float(result.loss) / ranks.world_size, stop.signal is not None, attempt.written(), attempt.is_superseded()]
                loss, stops, written, superseded = ranks.sums(own)
                if superseded:
                    raise checkpoint.superseded(trial.trial_id, attempt.number, done)
                stopping = stops > 0
                now = {"schedule/lr": lr, "schedule/eta": eta, "schedule/weight_decay": lam, "schedule/cycle": cycle}
                now |= {"epoch": done / steps_per_epoch(trial), "train/loss": loss}
                attempt.log(step, now | clock.logged())
                if not math.isfinite(loss):
                    return attempt.end("diverged", done, None, f"train/loss is {loss} at step {step}")
                if written == ranks.world_size:
                    with clock.stopped():
                        attempt.commit()
            if done in evaluated:
                with clock.stopped():
                    measured = _evaluate(trial, worker, data, attempt, done) | attempt.substitutions(step, data.substituted)
                    if done in ends:
                        answer = {f"anytime/{k.replace('/', '_')}": v for k, v in measured.items() if k.endswith("top1")}
                        measured |= result.measured | _train_eval(trial, worker, data, ranks)
                    attempt.log(step, measured | answer | clock.evaluated(worker.evaluation_model()))
            if done in saves or stopping:
                with clock.stopped():
                    attempt.save(worker, Progress(done, clock.seconds(), clock.waited, answer))
            if stopping and done < total:
                return attempt.stop(done, stop.signal or "a peer was told to stop")

        weights = worker.evaluation_model().state_dict()
        if broken := checkpoint.non_finite(measured | weights):  # by the last update: no loss comes after it
            return attempt.end("diverged", total, None, f"{broken} is not finite after the last step, {total - 1}")
        return attempt.end("finished", total, checkpoint.weights_sha256(weights))


def _evaluate(trial: Trial, worker: engine.Engine, data: loader.DataSet, attempt: Attempt, done: int) -> dict[str, float]:
    """holdout/* where there is a holdout, and val/* where the trial reports it; with a finalist's last answer test/* too.

    A finalist keeps which images of val and test its last answer has right: that of the last cycle that the budget completes.
    """
    last = trial.phase == "finalists" and done == max(cycle_ends(trial), default=0)
    views = {"holdout": data.holdout}
    if trial.evaluation.val:
        views["val"] = data.val
    if last and data.test is not None:
        views["test"] = data.test
    out: dict[str, float] = {}
    for split, view in views.items():
        if len(view):
            found = _on(view, trial, worker, attempt.ranks)
            out |= {f"{split}/{key}": value for key, value in found.metrics.items()}
            if last and split != "holdout":
                attempt.keep_correct(done - 1, split, found.correct)
    return out


def _train_eval(trial: Trial, worker: engine.Engine, data: loader.DataSet, ranks: Ranks) -> dict[str, float]:
    """Plain cross-entropy of the fixed clean training subset: tells "optimises worse" from "generalises worse"."""
    view = data.train_eval(trial.evaluation.train_eval_samples)
    return {"train_eval/loss": _on(view, trial, worker, ranks).metrics["loss"]}


def _on(view: loader.View, trial: Trial, worker: engine.Engine, ranks: Ranks) -> Evaluated:
    batches = loader.eval_batches(view, ranks.rank, ranks.world_size, trial.evaluation.batch_size)
    return evaluate(worker.evaluation_model(), batches, len(view), ranks)
