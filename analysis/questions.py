"""The reviewer's three questions -> a paragraph each, of what this study's intervals allow to say and what is missing for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.compare import ArmResult, Comparison, Pair, interval, sentence, signed
from analysis.maps import Map
from analysis.runs import Records
from analysis.searches import FEWEST, Duel, Searches
from harness.config import Arm, dotted


@dataclass(frozen=True)
class Answer:
    question: str
    text: str


def answers(records: Records, comparison: Comparison, searches: Searches, maps: Sequence[Map]) -> tuple[Answer, ...]:
    arms = records.study.study.arms
    return (
        Answer("Does decoupled weight decay pay?", " ".join(_decoupling(records, comparison, maps))),
        Answer("Is Adam with decoupled decay behind SGD with it?", " ".join(_behind(records, comparison))),
        Answer("Is what remains only insufficient tuning?", " ".join(_tuning(arms, comparison, searches))),
    )


def _decoupling(records: Records, comparison: Comparison, maps: Sequence[Map]) -> Iterator[str]:
    arms = records.study.study.arms
    pairs = [
        pair
        for pair in comparison.judged
        if _optimizer(arms, pair.a) == _optimizer(arms, pair.b) and {_decay(arms, pair.a), _decay(arms, pair.b)} == {"decoupled", "l2"}
    ]
    for pair in pairs:
        yield sentence(pair, comparison.workload)
        yield from _other_schedule(records, pair, "decay")
    for m in maps:
        if m.index.share_interval is not None:
            low, high = (100 * end for end in m.index.share_interval)
            yield (
                f"{m.arm}: {_percent(m.index.share)} % of the error's variation within {m.index.within:g} points of the best is "
                f"interaction of learning rate and decay (95 % interval {low:.0f} to {high:.0f} %, n = {m.index.n} runs)"
                + (
                    f"; the best decay moves {signed(m.index.slope)} decades a decade of learning rate (95 % interval "
                    f"{interval(m.index.slope_interval) if m.index.slope_interval else 'none'})."
                    if math.isfinite(m.index.slope)
                    else "."
                )
            )
        else:
            yield f"{m.arm}: no decoupling index: {m.index.note}."
    if not pairs and not maps:
        yield (
            "Not answered by this study: it compares no arm with decoupled decay to the same optimizer with L2, and has no map "
            "over learning rate and decay (sampler grid over optimizer.lr and decay.weight_decay, above 0)."
        )
    elif not pairs:
        yield "The errors of decoupled decay and L2 are not compared: no such pair is among the study's comparisons."
    elif not maps:
        yield "Whether learning rate and decay decouple is not measured: that needs a map (sampler grid over both, above 0)."


def _percent(share: float) -> str:
    """An unbiased estimate of a share that is near zero may be below it."""
    return f"{100 * share:z.0f}".replace("-", "−")


def _behind(records: Records, comparison: Comparison) -> Iterator[str]:
    pairs = list(_adam_against_sgd(records.study.study.arms, comparison))
    for pair in pairs:
        yield sentence(pair, comparison.workload)
        yield from _other_schedule(records, pair, "optimizer")
    if not pairs:
        yield "Not answered by this study: it compares no Adam arm with decoupled decay to an SGD arm with it."


def _other_schedule(records: Records, pair: Pair, what: str) -> Iterator[str]:
    """Without `comparisons` a study compares every pair of its arms, also those that differ in more than the question asks."""
    a, b = (_schedule(records, name) for name in (pair.a, pair.b))
    odd = [key for key in a | b if a.get(key) != b.get(key)]
    if odd:
        how = f"{a['schedule.name']} and {b['schedule.name']}" if "schedule.name" in odd else ", ".join(odd)
        yield f"These two differ in their schedules too ({how}), so this is not the effect of the {what} alone."


def _schedule(records: Records, name: str) -> dict[str, Any]:
    """What an arm says of its schedule, by dotted key: values, defaults too, and the axis of what it searches, of which trials differ."""
    trial = next(trial for trial in records.configs.values() if trial.arm == name)
    axes = {key: axis for key, axis in records.study.study.arms[name].space.items() if key.startswith("schedule.")}
    return dict(dotted({"schedule": trial.schedule.model_dump()})) | axes


def _tuning(arms: dict[str, Arm], comparison: Comparison, searches: Searches) -> Iterator[str]:
    pairs = list(_adam_against_sgd(arms, comparison))
    if not pairs:
        yield "Not answered by this study: it compares no Adam arm with decoupled decay to an SGD arm with it."
        return
    for pair in pairs:
        yield from _at_equal_budgets(pair, searches)
    for wide, narrow in searches.nested:
        duels = [d for d in searches.duels if (d.a, d.b) == (wide, narrow) and d.wins.interval is not None]
        if duels:
            yield f"{narrow} holds fixed what {wide} searches too: {_wins(duels[-1])}."
    named = dict.fromkeys(name for pair in pairs for name in (pair.a, pair.b))
    yield from _reach(arms, [comparison.arm(name) for name in named])


def _at_equal_budgets(pair: Pair, searches: Searches) -> Iterator[str]:
    duels = [duel for duel in searches.duels if (duel.a, duel.b) == (pair.a, pair.b) and duel.wins.interval is not None]
    if not duels:
        yield f"{pair.a} and {pair.b} cannot be compared at equal tuning budgets: that needs a search of {FEWEST} points or more in both."
        return
    margin, budgets = duels[0].difference.margin, searches.shown(pair.a, pair.b)
    shown = f"is shown for tuning with {budgets} trial{'s' * (budgets != '1')}" if budgets else "is shown at no budget"
    yield f"Tuned with equal budgets, {_wins(duels[-1])}; that {pair.a} is at most {margin:g} points behind, by holdout error, {shown}."


def _wins(duel: Duel) -> str:
    low, high = duel.wins.interval or (math.nan, math.nan)
    return (
        f"with {duel.budget} trial{'s' if duel.budget > 1 else ''} {duel.a} ends ahead of {duel.b} with probability {duel.wins.value:.2f} "
        f"(95 % interval {low:.2f} to {high:.2f})"
    )


def _reach(arms: dict[str, Arm], named: Sequence[ArmResult]) -> Iterator[str]:
    """Whether the search was wide enough to call an arm well tuned at all."""
    edged = [arm.name for arm in named if arm.at_edge]
    if edged:
        yield f"Not to be called well tuned, as the best point lies at the edge of its box: {', '.join(edged)}."
    frozen = [arm.name for arm in named if _optimizer(arms, arm.name) == "adam" and "optimizer.eps" not in arms[arm.name].space]
    if frozen:
        yield (
            f"{', '.join(frozen)} held eps fixed: momentum SGD is out of its reach, so that the argument that the more general "
            "optimizer cannot lose (Choi et al.) does not apply to it."
        )


def _adam_against_sgd(arms: dict[str, Arm], comparison: Comparison) -> Iterator[Pair]:
    for pair in comparison.judged:
        decays = {_decay(arms, pair.a), _decay(arms, pair.b)}
        if {_optimizer(arms, pair.a), _optimizer(arms, pair.b)} == {"adam", "sgd"} and decays == {"decoupled"}:
            yield pair


def _optimizer(arms: dict[str, Arm], name: str) -> str:
    return str(arms[name].optimizer.get("name"))


def _decay(arms: dict[str, Arm], name: str) -> str:
    return str(arms[name].decay.get("name"))
