"""All that a study's records allow to say, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from analysis import tables
from analysis.compare import Comparison, compare, counted
from analysis.maps import Map, maps, off_axes
from analysis.questions import Answer, answers
from analysis.runs import Records
from analysis.searches import FEWEST, Searches, searches
from analysis.tables import Table
from analysis.training import Anytime, Catching, Cost, Gap, LossPoints, anytime, catching, costs, gaps, loss_points


@dataclass(frozen=True)
class Findings:
    comparison: Comparison
    searches: Searches
    maps: tuple[Map, ...]
    off_axes: Mapping[str, int]
    """arm -> configurations that no map shows"""
    anytime: tuple[Anytime, ...]
    catching: tuple[Catching, ...]
    loss_points: LossPoints
    gaps: tuple[Gap, ...]
    costs: tuple[Cost, ...]
    answers: tuple[Answer, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """What this study does not tell, and what that would need, a line each."""
        return tuple(_missing(self))

    def tables(self) -> tuple[Table, ...]:
        """Arms always, the others where they have rows."""
        others = (
            tables.pairs_table(self.comparison),
            tables.budgets_table(self.searches),
            tables.maps_table(self.maps),
            tables.anytime_table(self.anytime),
            tables.catching_table(self.catching),
            tables.gaps_table(self.gaps),
            tables.costs_table(self.costs),
        )
        return tables.arms_table(self.comparison), *(table for table in others if table.rows)


def find(records: Records) -> Findings:
    comparison, points = compare(records), loss_points(records)
    searched, mapped = searches(records, comparison), maps(records)
    return Findings(
        comparison=comparison,
        searches=searched,
        maps=mapped,
        off_axes=off_axes(records),
        anytime=anytime(records, comparison),
        catching=catching(records, comparison),
        loss_points=points,
        gaps=gaps(records, comparison, points),
        costs=costs(records),
        answers=answers(records, comparison, searched, mapped),
    )


def _missing(found: Findings) -> Iterator[str]:
    if not found.searches.curves:
        yield f"Tuning budgets: no arm has {FEWEST} searched configurations with a holdout error."
    elif not found.searches.duels:
        yield "Tuning budgets of pairs: no two compared arms have both searched."
    if not found.maps:
        yield "Heat maps and decoupling index: no arm searches a grid over exactly optimizer.lr and decay.weight_decay, above 0."
    for arm, count in found.off_axes.items():
        yield f"Maps: logarithmic axes have no place for {counted(count, 'configuration')} of {arm} with a learning rate or a decay of 0."
    if not found.anytime:
        yield "Anytime curves: no reported trial has completed a cycle."
    if not any(gap.difference.interval for gap in found.gaps):
        yield "Generalisation gap: too few configurations of two compared arms end at training losses that both reach."
    if not any(pair.difference.method == "seeds x images" for pair in found.comparison.pairs):
        yield "Intervals over images: the reported trials kept no correctness bits (finalists do), or their splits differ."
    if not found.costs:
        yield "Cost: this store has no journals of the study."
    yield "Transfer of the best decay between budgets: compare the maps of two studies, analysis.estimate.transfer."
