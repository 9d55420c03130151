"""The rows of the table: which runs each needs, its figure and its limit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.config import BadInput
from tests.equivalence.control import Outcome
from tests.equivalence.problem import (
    ARMS,
    BACKENDS,
    CLIP_NORM,
    EVALUATED,
    FURTHER,
    MOVED,
    Backend,
    Course,
    State,
    distance,
    make,
)
from tests.equivalence.rank import ControlRun, EngineRun, Failed, Run, saved, state, trial_folder
from tests.report import Row, failed, row

FP32_LIMITS = (1e-6, 1e-5)
"""a limit is ten times what another order of summation does to the control, but at least and at most these"""
RECORDED_LIMIT = 1e-6
LOSS_LIMIT, PREDICTION_LIMIT = 1e-4, 1e-3
POWER = 100
"""a mistake must exceed the limit of its row so many times"""
MUST_RUN = ("ddp", "deepspeed")
"""backends whose fp32 cells may not be refused"""


class Results:
    """What the runs left behind."""

    def __init__(self, found: Mapping[str, Any], root: Path, course: Course) -> None:
        self._found, self._root, self.course = found, root, course
        self._states: dict[tuple[str, int], State] = {}

    def of(self, run: Run) -> Any:
        result = self._found[run.name]
        if isinstance(result, Failed):
            raise result
        return result

    def state(self, run: EngineRun, step: int | None = None) -> State:
        self.of(run)
        key = (run.name, run.stop if step is None else step)
        if key not in self._states:
            self._states[key] = state(saved(trial_folder(self._root, run.name), key[1]))
        return self._states[key]

    def control(self, arm: str) -> State:
        outcome: Outcome = self.of(control_run(self.course, arm))
        return outcome.states[self.course.steps]

    def limit(self, arm: str, part: str = "weights") -> float:
        low, high = FP32_LIMITS
        return min(high, max(low, 10 * self.reordered(arm, part)))

    def reordered(self, arm: str, part: str = "weights") -> float:
        other: Outcome = self.of(control_run(self.course, arm, reverse=True))
        return distance(getattr(other.states[self.course.steps], part), getattr(self.control(arm), part))


@dataclass(frozen=True)
class Cell:
    name: str
    runs: tuple[Run, ...]
    judge: Callable[[Results, str], Row]
    refused: str | None = None

    def row(self, results: Results) -> Row:
        if self.refused is not None:
            must = self.name.startswith(MUST_RUN) and "bf16" not in self.name
            return Row(self.name, None, None, not must, self.refused, refused=True)
        try:
            return self.judge(results, self.name)
        except Failed as error:
            return failed(self.name, _brief(str(error)))
        except Exception as error:
            return failed(self.name, f"{type(error).__name__}: {error}")


def _brief(text: str) -> str:
    """The end of a traceback: the error, and the last line of ours that it went through."""
    lines = [line.strip() for line in text.strip().splitlines()]
    where = next((line for line in reversed(lines) if line.startswith("File") and "site-packages" not in line), "")
    return f"{lines[-1][:300]} ({where})" if where else lines[-1][:300]


# ---------------------------------------------------------------------------------------------------- runs


def control_run(course: Course, arm: str, *, reverse: bool = False, precision: str = "fp32", device: str = "cpu") -> ControlRun:
    name = ", ".join(["control", arm, *(["reversed"] if reverse else []), *(["bf16"] if precision == "bf16" else [])])
    return ControlRun(name, arm, course, precision, (course.steps,), reverse, device)


def controls(course: Course, arm: str, device: str) -> tuple[Run, Run]:
    return control_run(course, arm, device=device), control_run(course, arm, reverse=True, device=device)


def whole(course: Course, backend: Backend, arm: str, world: int) -> EngineRun:
    """All steps, undisturbed."""
    saves = {course.middle, course.after, course.restart} if arm in MOVED else set()
    return EngineRun(f"{backend}, {arm}, world {world}", make(course, arm, backend), course, world, course.steps, saves=tuple(saves))


def resumed(course: Course, source: EngineRun, backend: Backend, arm: str, world: int) -> EngineRun:
    """20 steps from the middle of a cycle."""
    return EngineRun(
        f"{source.name} to {backend}, world {world}", make(course, arm, backend), course, world, course.after,
        start=course.middle, source=source.name,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- rows


def reordered(arm: str, results: Results, name: str) -> Row:
    clipped = results.of(control_run(results.course, arm)).clipped
    parts = ", ".join(f"{part} {results.reordered(arm, part):.1e}" for part in ("running", "moments"))
    note = f"{parts}; clipped in {clipped} of {results.course.steps} steps"
    return row(name, results.reordered(arm), FP32_LIMITS[1], note, ok=0 < clipped < results.course.steps)


def equal(run: EngineRun, arm: str, results: Results, name: str) -> Row:
    limits = {part: results.limit(arm, part) for part in State._fields}
    return compared(name, results.state(run), results.control(arm), limits)


def compared(name: str, ours: State, theirs: State, limits: Mapping[str, float]) -> Row:
    """The figure is that of the weights, the note has the others'; or that of what is beyond its own limit."""
    figures = {part: distance(getattr(ours, part), getattr(theirs, part)) for part in limits}
    shown = next((part for part in limits if not figures[part] <= limits[part]), "weights")
    notes = [f"{part} {figures[part]:.1e} of {limits[part]:.1e}" for part in limits if part != shown]
    return row(name, figures[shown], limits[shown], ", ".join([*([f"figure: {shown}"] if shown != "weights" else []), *notes]))


def recorded(run: EngineRun, control: ControlRun, results: Results, name: str) -> Row:
    """Without running statistics, which are not made from gradients."""
    limits = dict.fromkeys(("weights", "moments"), RECORDED_LIMIT)
    return compared(name, results.state(run), results.of(control).states[run.stop], limits)


def printed(run: EngineRun, control: ControlRun, results: Results, name: str) -> Row:
    ours, theirs = results.state(run), results.of(control)
    loss = results.of(run).evaluation.loss
    note = f"not limited; evaluation loss {loss:.4f}, control {theirs.evaluation.loss:.4f}"
    figure = distance(ours.weights, theirs.states[run.stop].weights)
    return Row(name, figure, None, math.isfinite(figure), note)


def exceeding(run: EngineRun, arm: str, results: Results, name: str) -> Row:
    figure, limit = distance(results.state(run).weights, results.control(arm).weights), POWER * results.limit(arm)
    return Row(name, figure, limit, figure >= limit, f"must exceed {POWER} times the limit", exceeds=True)


def moved(source: EngineRun, target: EngineRun, arm: str, bits: bool, results: Results, name: str) -> Row:
    """Against the run that was saved, which went on undisturbed; bits: equal to the last one."""
    limits = {part: 0.0 if bits else results.limit(arm, part) for part in State._fields}
    return compared(name, results.state(target), results.state(source, target.stop), limits)


def evaluated_loss(runs: Sequence[Run], results: Results, name: str) -> Row:
    """The largest difference between any two: the control and the same steps at each world size."""
    losses = {run.name.rpartition(", ")[2]: results.of(run).evaluation.loss for run in runs[1:]}
    losses["control"] = results.of(runs[0]).evaluation.loss
    note = ", ".join(f"{who} {loss:.6f}" for who, loss in losses.items())
    return row(name, max(losses.values()) - min(losses.values()), LOSS_LIMIT, note)


def evaluated_predictions(runs: Sequence[Run], results: Results, name: str) -> Row:
    """The largest share of digits that any two predict differently."""
    found = [results.of(run).evaluation.predictions for run in runs]
    unequal = max(int((a != b).sum()) for a, b in itertools.combinations(found, 2))
    return row(name, unequal / EVALUATED, PREDICTION_LIMIT, f"{unequal} of {EVALUATED} digits")


def saved_is_evaluated(runs: Sequence[Run], results: Results, name: str) -> Row:
    runs = [run for run in runs if isinstance(run, EngineRun)]
    unlike = {entry for run in runs for entry in results.of(run).unlike}
    return row(name, float(len(unlike)), 0.0, f"weights and buffers, {len(runs)} run(s); {', '.join(sorted(unlike)) or 'bit-equal'}")


# -------------------------------------------------------------------------------------------------- table


def table(course: Course, worlds: Sequence[int] = (1, 2, 4), device: str = "cpu") -> list[Cell]:
    """Every cell, in the order of the table. worlds: the world sizes there are devices for."""
    two = max(world for world in worlds if world <= 2)
    sections = (_arms, _fp32, _bf16, _power, _moves, _between_backends, _evaluation)
    return [cell for section in sections for cell in section(course, two, worlds, device)]


def _cell(name: str, build: Callable[[], tuple[Sequence[Run], Callable[[Results, str], Row]]]) -> Cell:
    """A cell, or a refused one where the schema refuses a trial it needs."""
    try:
        runs, judge = build()
    except BadInput as error:
        return Cell(name, (), _unreachable, str(error))
    return Cell(name, tuple(runs), judge)


def _unreachable(results: Results, name: str) -> Row:
    raise AssertionError(name)


Cells = Iterator[Cell]
Worlds = Sequence[int]


def _arms(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    for arm in ARMS:
        yield Cell(f"control reordered, {arm}", controls(course, arm, device), partial(reordered, arm))


def _fp32(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    for backend in (*BACKENDS, *FURTHER):
        for arm in MOVED if backend in FURTHER else ARMS:

            def build(backend: Backend = backend, arm: str = arm) -> Any:
                run = whole(course, backend, arm, two)
                return (*controls(course, arm, device), run), partial(equal, run, arm)

            yield _cell(f"{backend}, {arm}", build)


def _bf16(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    for backend in BACKENDS:
        for arm in MOVED:
            control = control_run(course, arm, precision="bf16", device=device)
            for kind, judge, tape in (("recorded gradients", recorded, control), ("end to end", printed, None)):

                def build(
                    backend: Backend = backend, arm: str = arm, kind: str = kind, judge: Any = judge,
                    control: ControlRun = control, tape: ControlRun | None = tape,
                ) -> Any:  # fmt: skip
                    name = f"{backend}, {arm}, bf16 {kind}, world {two}"
                    run = EngineRun(name, make(course, arm, backend, "bf16"), course, two, course.steps, replayed=tape)
                    return (control, run), partial(judge, run, control)

                yield _cell(f"{backend} bf16 {kind}, {arm}", build)


def _power(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    """Mistakes made on purpose, through the plainest engine."""
    ddp, first = BACKENDS[0], course.restart
    for arm in MOVED:
        right = whole(course, ddp, arm, two)
        once = {first: first - 1}
        mistakes = {
            "stale lambda on the first step after a restart": replace(right, stale=once),
            "stale lambda after a resume on a restart": replace(right, stale=once, start=first, source=right.name),
            "a restart whose decay is not recomputed": replace(right, stale={step: first - 1 for step in range(first, course.steps)}),
            "decay on the exempt group": replace(right, trial=make(course, arm, ddp, exempt_1d=False)),
            "clip norm 10 % too large": replace(right, trial=make(course, arm, ddp, clip_norm=1.1 * CLIP_NORM)),
        }
        for mistake, wrong in mistakes.items():
            name = f"mistake: {mistake}, {arm}"
            run = replace(wrong, name=name, saves=())
            yield Cell(name, (*controls(course, arm, device), *([right] if run.source else []), run), partial(exceeding, run, arm))


def _moves(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    changes = [(w, v) for w, v in ((2, 1), (1, 2), (2, 4), (4, 2)) if {w, v} <= set(worlds)]
    for backend in BACKENDS:
        for arm in MOVED:
            same = [(two, two)] if backend == BACKENDS[0] else []
            for w, v in [*same, *changes]:

                def build(backend: Backend = backend, arm: str = arm, w: int = w, v: int = v) -> Any:
                    source = whole(course, backend, arm, w)
                    target = resumed(course, source, backend, arm, v)
                    return (*controls(course, arm, device), source, target), partial(moved, source, target, arm, w == v)

                yield _cell(f"{backend} saved at world {w}, resumed at {v}, {arm}", build)
    for arm in MOVED:
        source = whole(course, BACKENDS[0], arm, two)
        right = replace(source, name=f"{source.name} on a restart", start=course.restart, source=source.name, saves=())
        runs = (*controls(course, arm, device), source, right)
        yield Cell(f"ddp 0 resumed on a restart, {arm}", runs, partial(moved, source, right, arm, True))


def _between_backends(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    ddp = BACKENDS[0]
    for other in (b for b in BACKENDS if b.stage and b.name != "ddp"):
        for a, b in ((ddp, other), (other, ddp)):
            for arm in MOVED:

                def build(a: Backend = a, b: Backend = b, arm: str = arm) -> Any:
                    source = whole(course, a, arm, two)
                    target = resumed(course, source, b, arm, two)
                    return (*controls(course, arm, device), source, target), partial(moved, source, target, arm, False)

                yield _cell(f"saved by {a}, resumed by {b}, {arm}", build)


def _evaluation(course: Course, two: int, worlds: Worlds, device: str) -> Cells:
    judges = {"loss": evaluated_loss, "predictions": evaluated_predictions, "saved is evaluated": saved_is_evaluated}
    for backend in BACKENDS:
        for arm in MOVED:
            for what, judge in judges.items():

                def build(backend: Backend = backend, arm: str = arm, judge: Any = judge) -> Any:
                    runs = [control_run(course, arm, device=device), *(whole(course, backend, arm, world) for world in worlds)]
                    return runs, partial(judge, runs)

                yield _cell(f"{backend} evaluated at worlds {', '.join(map(str, worlds))}: {what}, {arm}", build)
