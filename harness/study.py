"""Study file -> resolved trials with ids; quasi-random points, a stream an arm.

Everything is found here, before anything is submitted: `load` validates the file, its workload and every trial.
`planned` is a pure function of the study and of the holdout results known so far, so that a plan, a submission and a
report always agree on what the study's trials are.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from harness import schedule
from harness.config import (
    DERIVED,
    Adam,
    Arm,
    BadInput,
    Choice,
    Data,
    Reference,
    Study,
    Trial,
    WorkloadFile,
    comparable,
    did_you_mean,
    dotted,
    find,
    parse,
    parse_yaml,
    read_yaml,
    shown,
)

DEFAULTS = ("budget", "evaluation", "checkpoint")
"""blocks of a workload file that a study may override"""


REFERRED: Any = {
    "data": {"image_size", "resize", "eval_image_size", "val_samples", "num_classes"},
    "model": True,
    "recipe": True,
    "budget": True,
}
"""of a workload: what the published number depends on; a study that changes one of these is said to depart from it"""

WARMUP = "schedule.warmup_epochs"
"""told of too, where the published one is stated"""

BLOCKS = ("optimizer", "decay", "schedule")
MOST = 20_000
"""trials of a phase: a plan of them takes seconds"""

DEFAULT_BETA2: float = Adam.model_fields["betas"].default[1]
DEFAULT_EPS: float = Adam.model_fields["eps"].default


@dataclass(frozen=True)
class Planned:
    """One trial of a study; `trial` is None for a finalist whose configuration the search has not decided yet."""

    arm: str
    phase: str
    seed: int
    trial: Trial | None


@dataclass(frozen=True)
class LoadedStudy:
    """A validated study file together with its workload."""

    study: Study
    workload: WorkloadFile
    source: str

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def phases(self) -> tuple[str, ...]:
        return ("search",) if self.study.finalists is None else ("search", "finalists")

    def text(self) -> str:
        """The study with its workload written out, to be stored beside its trials: later edits of configs do not move it."""
        document = self.study.model_dump(mode="json")
        workload = self.workload.model_dump(mode="json")
        document |= {key: workload.pop(key) for key in DEFAULTS}
        return yaml.safe_dump(document | {"workload": workload}, sort_keys=False)


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedStudy:
    """The study in FILE with `a.b=c` overrides applied.

    Raises BadInput, a line a mistake: every trial of the search is resolved and checked, so nothing is found later.
    """
    source = str(path)
    document = read_yaml(Path(path))
    document.setdefault("name", Path(path).stem)
    written = copy.deepcopy(document)
    for override in overrides:
        _set(document, override)
    _check_said_once(document, overrides, source)
    study = parse(Study, document, source)
    _check_size(study, source)
    loaded = LoadedStudy(study, _workload(study, source, written), source)
    trials = [p.trial for p in planned(loaded, {}) if p.trial is not None]
    if (reference := loaded.workload.reference) is not None:
        departures = (*reference.departures, *_warmups(trials, reference))
        loaded = replace(loaded, workload=_departing(loaded.workload, departures))
    first: dict[str, Trial] = {}
    for trial in trials:
        twin = first.setdefault(trial.trial_id, trial)
        if twin.arm != trial.arm:
            raise BadInput(
                f"{source}: arms.{trial.arm}: its trial {trial.trial_id} (seed {trial.seed}) is also one of arm {twin.arm}; "
                "arms must differ in optimizer, decay, schedule or space"
            )
        if twin is not trial:
            raise BadInput(
                f"{source}: arms.{trial.arm}: two points of its space are one trial, {trial.trial_id}; "
                "values of a choice must differ, also as the trial reads them"
            )
    if study.ranks is not None:
        try:
            trials[0].micro_batch_size(study.ranks)
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from None
    return loaded


def _set(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(f"--set {shown(override)}: must be KEY=VALUE with a dotted key; e.g. --set budget.epochs=3")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise BadInput(f"--set {shown(override)}: {shown(text)} is not a YAML value; e.g. --set budget.epochs=3") from None
    inside: dict[str, Any] = document
    arms = document.get("arms")
    known = [str(name) for name in arms] if isinstance(arms, dict) else []
    *parents, last = _path(key, known)
    if known and parents[:1] == ["arms"] and len(parents) > 1 and parents[1] not in known:
        raise BadInput(
            f"--set {shown(override)}: {shown(parents[1])} is no arm; {did_you_mean(parents[1], known)}valid: {', '.join(known)}; "
            "a new one is set whole; e.g. --set 'arms.New={optimizer: {name: sgd, lr: 0.1}, schedule: {name: cosine}}'"
        )
    for part in parents:
        below = inside.setdefault(part, {})
        if part == "workload" and isinstance(below, str):
            below = inside[part] = {"name": below}
        if not isinstance(below, dict):
            raise BadInput(f"--set {shown(override)}: {part} is {shown(below)}, which has no keys")
        inside = below
    inside[last] = value


def _path(key: str, arms: Sequence[str]) -> list[str]:
    """The parts of a dotted key; the name of an arm is one, and what follows `space`, or a box, since an axis is itself a dotted key."""
    parts = key.split(".")
    arm = max((name for name in arms if key.startswith(f"arms.{name}.")), key=len, default="")
    if arm:
        parts[1 : 2 + arm.count(".")] = [arm]
    axis = {"space": 3, "boxes": 4}.get(parts[2]) if len(parts) > 2 and parts[0] == "arms" else None
    if axis is None or len(parts) < axis + 2:
        return parts
    return [*parts[:axis], ".".join(parts[axis : axis + 2]), *parts[axis + 2 :]]


def _check_said_once(document: Mapping[str, Any], overrides: Sequence[str], source: str) -> None:
    """BadInput where the study has a value of its own for what it also overrides of its workload: that would be passed over.

    A workload that is complete in itself has defaults, as a file of configs/workload has: they are refused only by --set.
    """
    workload = document.get("workload")
    if not isinstance(workload, dict):
        return
    complete, set_keys = _is_whole(workload), [override.partition("=")[0] for override in overrides]
    for key, (theirs, own) in _both({k: workload[k] for k in DEFAULTS if k in workload}, document):
        there = f"workload.{key}"
        if not complete or any(f"{there}.".startswith(f"{k}.") or k.startswith(f"{there}.") for k in set_keys):
            raise BadInput(f"{source}: {there}: {shown(theirs)} is set, and {key}: {shown(own)} too, which stands before it; set {key}")


def _both(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, both values) of what both say."""
    for key in a:
        if key in b and isinstance(a[key], Mapping) and isinstance(b[key], Mapping):
            yield from _both(a[key], b[key], f"{prefix}{key}.")
        elif key in b:
            yield f"{prefix}{key}", (a[key], b[key])


def _check_size(study: Study, source: str) -> None:
    """BadInput where a space lacks points, or there are more than MOST trials: counted, before anything is drawn."""
    grid, asked, seeds = study.sampler.name == "grid", study.search.points, len(study.search.seeds)
    spaces = {name: arm.space for name, arm in study.arms.items() if arm.space}
    lacking = [(name, key) for name, space in spaces.items() for key, axis in sorted(space.items()) if not _count(axis)]
    if grid and lacking:
        missing = "missing; sampler grid needs the points along each axis; e.g. 5"
        raise BadInput("\n".join(f"{source}: {study.arms[name].written(name, key)}.num: {missing}" for name, key in lacking))
    if not grid and spaces and asked is None:
        raise BadInput(f"{source}: search.points: missing; arm {next(iter(spaces))} has a space to search; e.g. 8")
    most = {name: math.prod(map(_count, space.values())) for name, space in spaces.items()}
    counts = [most[name] if grid else asked or 1 for name in spaces] + [1] * (len(study.arms) - len(spaces))
    if (trials := sum(counts) * seeds) > MOST:
        room = (MOST // seeds - len(study.arms) + len(spaces)) // max(1, len(spaces))
        num = int(max(0, room) ** (1 / max(map(len, spaces.values()), default=1)))
        advice = f"num: {num}" if grid else f"search.points={room}"
        raise BadInput(
            f"{source}: search: {sum(counts)} points of {len(study.arms)} arm(s) x {seeds} seed(s) = {trials} trials, "
            f"must be at most {MOST}; e.g. {advice if (num > 1 if grid else room > 0) else 'fewer search.seeds'}"
        )
    top, fresh = (study.finalists.top, len(study.finalists.seeds)) if study.finalists else (0, 0)
    if (best := sum(min(top, count) for count in counts)) * fresh > MOST:
        raise BadInput(
            f"{source}: finalists: {best} configurations x {fresh} seed(s) = {best * fresh} trials, must be at most {MOST}; "
            f"e.g. finalists.seeds={MOST // best}"
        )
    for name, space in spaces.items():
        if not grid and asked and asked > most[name] and all(isinstance(axis, Choice) for axis in space.values()):
            raise BadInput(f"{source}: {_too_few(name, asked, most[name])}")
        for key, axis in space.items():
            if grid and not isinstance(axis, Choice) and (distinct := len(set(_levels(axis)))) < _count(axis):
                where, advice = f"{study.arms[name].written(name, key)}.num", str(distinct // 2) if distinct > 3 else "a wider axis"
                raise BadInput(f"{source}: {where}: {axis.num} points, of which {distinct} differ in six digits; e.g. {advice}")


def _count(axis: Any) -> int:
    """Points of a grid along it; 0: not said."""
    return len(axis.choice) if isinstance(axis, Choice) else axis.num or 0


def _too_few(arm: str, asked: int, there: int) -> str:
    return f"search.points: {asked} must be at most the {there} configuration(s) of the space of arm {arm}; e.g. search.points={there}"


def _workload(study: Study, source: str, written: Mapping[str, Any] | None = None) -> WorkloadFile:
    """The study's. written: the document before it was overridden; None: that is what this is."""
    overrides = dict(study.workload)
    name = overrides.pop("name", None)
    if not isinstance(name, str):
        raise BadInput(f"{source}: workload.name: missing; e.g. mnist5k_cnn")
    where = f"{source} (workload {name})"
    if _is_whole(study.workload):
        base = document = {"name": name, **overrides}
    else:
        path = find("workload", name)
        base = {"name": path.stem, **read_yaml(path)}
        document = _merged(base, overrides)
    for key in DEFAULTS:
        if not isinstance(document.get(key, {}), dict):
            raise BadInput(f"{where}: {key}: {shown(document[key])} must be a mapping of keys to values")
        document[key] = _merged(document.get(key, {}), getattr(study, key))

    def as_written(key: str) -> str:
        return key if key.partition(".")[0] in DEFAULTS else f"workload.{key}"

    workload = parse(WorkloadFile, document, where, as_written)
    stated = overrides.get("reference") or {}
    if base is not document and ("source" in stated) != ("top1_error" in stated):
        raise BadInput(f"{where}: workload.reference: source and top1_error are of one publication; state both, or neither")
    if workload.reference is not None:
        own, publication = parse(WorkloadFile, base, where, as_written), workload.reference.source
        if "images_per_second" not in stated:
            workload = _repriced(own, workload)
        if base is document or own.reference is None or own.reference.source != publication:
            # there is no workload file, or it is of another publication: what the study says itself, before --set, is the recipe
            own = _as_written(written, source, workload) if written is not None else workload
        workload = _departing(workload, _departures(own, workload))
    evaluation, test = workload.evaluation, workload.evaluation.test
    if test is not None:
        evaluation = evaluation.model_copy(update={"test": test.model_copy(update={"path": _absolute(test.path)})})
    data = workload.data.model_copy(update={"path": _absolute(workload.data.path)})
    return workload.model_copy(update={"data": data, "evaluation": evaluation})


def _is_whole(workload: Mapping[str, Any]) -> bool:
    """Whether it is written out, as in a store, and not changes of a workload file.

    With a name that no file has it is, too, where it has data and a model: then what these lack is told, not that there is no file.
    """
    data = workload.get("data")
    if not isinstance(data, Mapping) or "model" not in workload:
        return False
    if {key for key, field in Data.model_fields.items() if field.is_required()} <= data.keys():
        return True
    try:
        find("workload", str(workload.get("name")))
    except BadInput:
        return True
    return False


def _as_written(written: Mapping[str, Any], source: str, workload: WorkloadFile) -> WorkloadFile:
    """The workload of the document before --set, where that is of the same publication; else `workload` without departures."""
    with suppress(BadInput):  # it may lack what --set gives
        before = _workload(parse(Study, dict(written), source), source)
        if before.reference is not None and workload.reference is not None and before.reference.source == workload.reference.source:
            return before
    return _departing(workload, ())


def _departures(base: WorkloadFile, workload: WorkloadFile) -> Iterator[str]:
    """KEY: VALUE instead of VALUE, of what a result hangs on in a workload: from what was published where that is stated, else from
    `base`. If that is a stored study, its own departures tell what it departed from."""
    reference = workload.reference
    if reference is None:
        return
    before, now = (
        {
            key: _written(value)
            for key, value in (*dotted(w.model_dump(mode="json", include=REFERRED)), ("images trained on", w.data.trained_samples))
        }
        for w in (base, workload)
    )
    for line in base.reference.departures if base.reference is not None else ():
        key, _, values = line.partition(": ")
        if key != WARMUP:  # of the arms: told of them as they are now
            before[key] = values.rpartition(" instead of ")[2]
    if reference.epochs is not None:
        before["budget.epochs"] = _written(reference.epochs)
    if reference.trained_samples is not None:
        before["images trained on"] = _written(reference.trained_samples)
    for key in before | now:
        is_now, was = now.get(key, _written(None)), before.get(key, _written(None))
        if is_now != was:
            yield f"{key}: {is_now} instead of {was}"


def _written(value: Any) -> str:
    return "null" if value is None else str(value)


def _departing(workload: WorkloadFile, departures: Iterable[str]) -> WorkloadFile:
    """With these in its reference, where it has one, and no others."""
    reference = workload.reference
    if reference is None:
        return workload
    return workload.model_copy(update={"reference": reference.model_copy(update={"departures": tuple(departures)})})


def _repriced(base: WorkloadFile, workload: WorkloadFile) -> WorkloadFile:
    """With the workload file's speed at the study's image size: a step's time is nearly as its pixels."""
    reference = workload.reference
    if reference is None:
        return workload
    rate = reference.images_per_second * (base.data.image_size / workload.data.image_size) ** 2
    return workload.model_copy(update={"reference": reference.model_copy(update={"images_per_second": rate})})


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


# --------------------------------------------------------------------------------------------------- points


def points(arm_name: str, arm: Arm, study: Study) -> Iterator[dict[str, Any]]:
    """The configurations of one arm, {dotted key: value} each, in order.

    Quasi-random points come from one scrambled stream an arm, seeded by the sampler's seed and the arm's name, over
    the axes in the order of their keys: the first n points of a longer search are the points of a shorter one, and no
    other arm moves them. A point that was drawn before is passed over. Values are rounded to six significant digits, so
    that ids do not hang on a last bit.
    """
    axes = sorted(arm.space.items())
    if not axes:
        yield {}
        return
    if study.sampler.name == "grid":
        for values in itertools.product(*(_levels(axis) for _, axis in axes)):
            yield dict(zip((key for key, _ in axes), values, strict=True))
        return
    assert study.search.points is not None, "checked with the study"
    from scipy.stats import qmc  # most of a second, which commands on studies without axes need not spend

    digest = hashlib.sha256(f"{study.sampler.seed}/{arm_name}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    engine = (qmc.Sobol if study.sampler.name == "sobol" else qmc.Halton)(len(axes), scramble=True, rng=seed)
    drawn: set[Any] = set()
    in_vain = 0
    while len(drawn) < study.search.points:
        point = {key: axis.at(float(u)) for (key, axis), u in zip(axes, engine.random(1)[0], strict=True)}
        if (values := tuple(map(comparable, point.values()))) not in drawn:
            drawn.add(values)
            in_vain = 0
            yield point
        elif (in_vain := in_vain + 1) > 1000 + 100 * len(drawn):  # one as likely as those drawn would have come up by now
            raise BadInput(_too_few(arm_name, study.search.points, len(drawn)))


def _levels(axis: Any) -> list[Any]:
    if isinstance(axis, Choice):
        return list(axis.choice)
    return [axis.at(i / (axis.num - 1)) for i in range(axis.num)]


def fields(arm: Arm, point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arm's optimizer, decay and schedule at a point of its axes. Pure; its inverse is `axis_values`.

    Two axes are no fields. optimizer.one_minus_beta1: momentum, or Adam's beta1, is 1 minus it. optimizer.effective_lr: lr is it
    times (eps + the arm's gradient_scale), eps as this point, the arm or Adam's default has it. Values of DERIVED fields have
    fifteen and twelve significant digits, enough to find the axis value again. ValueError where eps is no number.
    """
    blocks = {block: dict(getattr(arm, block)) for block in BLOCKS}
    for key, value in point.items():
        if key not in DERIVED:
            block, _, field = key.partition(".")
            blocks[block][field] = value
    optimizer = blocks["optimizer"]
    if "optimizer.one_minus_beta1" in point:
        beta1 = float(f"{1 - float(point['optimizer.one_minus_beta1']):.15g}")
        if optimizer.get("name") == "adam":
            optimizer["betas"] = [beta1, *(optimizer.get("betas") or (None, DEFAULT_BETA2))[1:]]
        else:
            optimizer["momentum"] = beta1
    if "optimizer.effective_lr" in point:
        optimizer["lr"] = float(f"{float(point['optimizer.effective_lr']) * _scale(arm, optimizer.get('eps', DEFAULT_EPS)):.12g}")
    return blocks


def axis_values(arm: Arm, trial: Trial) -> dict[str, Any]:
    """The point of its axes that made `trial` of `arm`: {dotted key: value}, the optimizer's first, as they were drawn."""
    keys = sorted(arm.space, key=lambda key: (BLOCKS.index(key.partition(".")[0]), key))
    return {key: _axis_value(arm, trial, key) for key in keys}


def _axis_value(arm: Arm, trial: Trial, key: str) -> Any:
    optimizer = trial.optimizer
    if key == "optimizer.one_minus_beta1":
        return _drawn(1 - (optimizer.betas[0] if optimizer.name == "adam" else optimizer.momentum))
    if key == "optimizer.effective_lr" and optimizer.name == "adam":
        return _drawn(optimizer.lr / _scale(arm, optimizer.eps))
    block, _, field = key.partition(".")
    return getattr(getattr(trial, block), field)


def _scale(arm: Arm, eps: Any) -> float:
    """What the effective rate is multiplied with."""
    assert arm.gradient_scale is not None, "checked with the arm"
    try:
        return float(eps) + arm.gradient_scale
    except (TypeError, ValueError):
        raise ValueError(f"optimizer.eps: {shown(eps)} must be a number; e.g. {DEFAULT_EPS:g}") from None


def _drawn(value: float) -> float:
    """Without the last bits that came of arithmetic: drawn values have six significant digits, written ones rarely more than nine."""
    return float(f"{value:.9g}")


# --------------------------------------------------------------------------------------------------- trials


def resolve(loaded: LoadedStudy, arm_name: str, point: Mapping[str, Any], phase: str, seed: int) -> Trial:
    """One point of one arm as a frozen trial. Raises BadInput naming keys as the study file spells them."""
    study, arm = loaded.study, loaded.study.arms[arm_name]
    try:
        blocks = fields(arm, point)
    except ValueError as error:
        key, _, fault = str(error).partition(":")
        raise BadInput(f"{loaded.source}: {arm.written(arm_name, key)}:{fault}") from None
    reports = phase == "finalists" or (study.finalists is None and loaded.workload.evaluation.val)
    document = {
        "study": study.name,
        "arm": arm_name,
        "phase": phase,
        "workload": loaded.workload.model_dump(include={"name", "data", "model", "recipe"}),
        **blocks,
        "budget": loaded.workload.budget.model_dump(),
        "evaluation": loaded.workload.evaluation.model_dump() | {"val": reports},
        "checkpoint": loaded.workload.checkpoint.model_dump(),
        "backend": study.backend,
        "seed": seed,
    }

    def as_written(key: str) -> str:
        if key == "seed":
            return f"{phase}.seeds"
        if key.partition(".")[0] not in blocks:
            return key
        axis = next((a for a in point if key == a or key.startswith(f"{a}.") or key in DERIVED.get(a, ())), key)
        return arm.written(arm_name, axis) + (key.removeprefix(axis) if key.startswith(axis) else "")

    return parse(Trial, document, loaded.source, as_written)


def first_trial(loaded: LoadedStudy) -> Trial:
    """Of the search; model, data, budget and backend are the same in all trials."""
    study = loaded.study
    name, arm = next(iter(study.arms.items()))
    return resolve(loaded, name, next(points(name, arm, study)), "search", study.search.seeds[0])


def planned(loaded: LoadedStudy, results: Mapping[str, float | None]) -> list[Planned]:
    """Every trial of the study, in order: the search of each arm, then its finalists.

    `results` maps the id of an ended trial to its holdout/top1 at the last completed cycle (a fraction; None when it
    failed or diverged, which ranks last). An arm's finalists are its `top` configurations by mean over the search
    seeds, first found first among equals; they are pending (trial None) until all of its search has ended.
    """
    study = loaded.study
    out: list[Planned] = []
    for name in study.arms:
        try:
            arm_points = list(points(name, study.arms[name], study))
        except BadInput as error:
            raise BadInput(f"{loaded.source}: {error}") from None
        ranked: list[tuple[float, int]] = []
        complete = True
        for index, point in enumerate(arm_points):
            trials = [resolve(loaded, name, point, "search", seed) for seed in study.search.seeds]
            out += [Planned(name, "search", t.seed, t) for t in trials]
            complete = complete and all(t.trial_id in results for t in trials)
            found = [results.get(t.trial_id) for t in trials]
            values = [v for v in found if v is not None and not math.isnan(v)]
            if len(values) == len(trials):
                ranked.append((-math.fsum(values) / len(values), index))
        if study.finalists is None:
            continue
        best = [index for _, index in sorted(ranked)[: study.finalists.top]] if complete else []
        for place in range(min(study.finalists.top, len(arm_points))):
            for seed in study.finalists.seeds:
                trial = resolve(loaded, name, arm_points[best[place]], "finalists", seed) if place < len(best) else None
                out.append(Planned(name, "finalists", seed, trial))
    return out


def _warmups(trials: Sequence[Trial], reference: Reference) -> Iterator[str]:
    """As departures, of the arms' schedules."""
    found = sorted({trial.schedule.warmup_epochs for trial in trials})
    if reference.warmup_epochs is not None and found not in ([], [reference.warmup_epochs]):
        yield f"{WARMUP}: {' and '.join(map(str, found))} instead of {reference.warmup_epochs}"


def _of_another_network(loaded: LoadedStudy) -> Iterator[str]:
    """Where a study changes the network of a workload file, and not what that file says of its size and speed."""
    changed = loaded.study.workload
    if "model" in changed and not {"parameters", "images_per_second"} <= (changed.get("reference") or {}).keys():
        with suppress(BadInput):
            path = find("workload", str(changed.get("name")))
            file = parse(WorkloadFile, {"name": path.stem, **read_yaml(path)}, str(path))
            if file.reference is not None and file.model != loaded.workload.model:
                yield (
                    f"workload.model: {loaded.workload.model.name} instead of {file.model.name}, of which workload.reference has "
                    "parameters and images_per_second: GPU-hours and bytes are its, too; state both"
                )


def warnings(loaded: LoadedStudy) -> list[str]:
    """What is legal and probably not meant, one line each, each once."""
    trials = [p.trial for p in planned(loaded, {}) if p.trial is not None]
    lines = [line for trial in trials for line in schedule.warnings(trial)]
    reference = loaded.workload.reference
    lines += _of_another_network(loaded)
    if reference is not None and reference.departures:
        error = "no error is printed" if reference.top1_error is None else f"top-1 error {reference.top1_error:g} %"
        departures = ", ".join(reference.departures)
        lines.append(f"workload {loaded.workload.name} departs from its reference ({error}), {reference.source}: {departures}")
    data = loaded.workload.data
    if data.holdout_samples == 0 and loaded.study.finalists is not None:
        key, value = ("train_on", "train") if data.train_on != "train" else ("holdout_per_class", "50")
        lines.append(f"workload.data.{key}: {getattr(data, key)}, so there is no holdout and finalists cannot be chosen; e.g. {value}")
    if loaded.workload.recipe.resolution is not None:
        restarted = ", ".join(dict.fromkeys(trial.arm for trial in trials if trial.schedule.name == "cosine_restarts"))
        if restarted:
            lines.append(f"workload.recipe.resolution: blurs what the restarts of {restarted} do; leave it out of a comparison")
    test = loaded.workload.evaluation.test
    if test is not None and loaded.study.finalists is None:
        lines.append(f"evaluation.test: {test.name} is for finalists, of which there are none; e.g. finalists: {{top: 1, seeds: 8}}")
    return list(dict.fromkeys(lines))
