"""What a study's records allow to say, on studies whose truth is known: maps, searches, the course of training, the archive."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from analysis import archive, runs
from analysis.findings import Findings, find
from analysis.report import report


@pytest.fixture(scope="module")
def maps(synthetic_maps: Path) -> Findings:
    return find(runs.read("maps", synthetic_maps))


@pytest.fixture(scope="module")
def searched(synthetic_store: Path) -> Findings:
    return find(runs.read("synthetic", synthetic_store))


def test_maps_say_which_optimizer_decouples(maps: Findings) -> None:
    adam, adamw = maps.maps
    assert (adam.arm, adam.decay_name, adamw.arm, adamw.decay_name) == ("Adam", "L2 coefficient", "AdamW", "λ")
    assert adamw.errors.shape == (5, 5, 2)
    assert adamw.index.share < 0.05 < 0.3 < adam.index.share
    assert abs(adamw.index.slope) < 0.1
    assert adam.index.slope == pytest.approx(-0.8 / 1.2, abs=0.15)
    assert adam.index.diverged == 2  # the corner, twice


def test_the_positive_control_tilts(maps: Findings) -> None:
    adam, adamw = maps.maps
    assert adam.in_torch_units is None
    assert adamw.in_torch_units is not None
    assert adamw.in_torch_units.index.slope == pytest.approx(-1, abs=0.15)
    assert adamw.in_torch_units.index.share > 0.3


def test_the_first_question_is_answered_by_pair_and_by_map(maps: Findings) -> None:
    first, second, third = maps.answers
    assert "On mnist5k_cnn (1,000 validation images)" in first.text
    assert "AdamW: " in first.text and "is interaction of learning rate and decay" in first.text
    assert second.text.startswith("Not answered by this study")
    assert third.text.startswith("Not answered by this study")


def test_a_report_of_maps_has_the_figure_and_the_table(synthetic_maps: Path) -> None:
    page = report("maps", synthetic_maps)
    assert (page.parent / "maps.png").stat().st_size > 10_000
    assert "Do learning rate and decay decouple?" in page.read_text()
    found = json.loads((page.parent / "summary.json").read_text())["decoupling"]
    assert found["AdamW"]["share"] < found["Adam"]["share"]


def test_errors_of_a_search_are_the_holdouts_and_diverged_counts_as_worst(searched: Findings) -> None:
    adam, sgd = searched.searches.errors["AdamWR"], searched.searches.errors["SGDWR"]
    assert [math.isnan(e) for e in adam] == [False, False, False, True]  # a failed trial is lost, not bad
    assert [math.isinf(e) for e in sgd] == [False, False, True, False]
    assert "AdamWR" not in searched.searches.curves  # three points are no curve
    assert [p.budget for p in searched.searches.curves["SGDWR"]] == [1, 2]


def test_the_course_of_training_is_that_of_the_reported_trials(searched: Findings) -> None:
    adam = next(one for one in searched.anytime if one.arm == "AdamWR")
    assert [epoch for epoch, _ in adam.at_cycle_ends] == [1, 3, 7]
    assert adam.at_cycle_ends[-1][1].value == pytest.approx(searched.comparison.arm("AdamWR").error.value)
    first, second = adam.at_cycle_ends[0][1].value, adam.at_cycle_ends[1][1].value
    assert adam.area.value == pytest.approx((2 * first + 4 * second) / 6)
    caught = {(one.a, one.b): one for one in searched.catching}
    assert caught["AdamWR", "SGDWR"].epochs.value == 7
    assert caught["SGDWR", "AdamWR"].reached < 5


def test_what_is_not_told_is_named(searched: Findings) -> None:
    said = " ".join(searched.missing)
    for what in ("Heat maps and decoupling index", "Generalisation gap", "Intervals over images"):
        assert what in said


def test_an_archive_makes_the_same_report_bit_by_bit(synthetic_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (folder / "data" / "synthetic").mkdir(parents=True)
    (folder / "data" / "synthetic" / "stale").touch()
    (folder / "notes.md").write_text("mine")
    archive.save(runs.read("synthetic", synthetic_store), folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert not (folder / "data" / "synthetic" / "stale").exists()
    assert str(Path.cwd()) not in (folder / "data" / "synthetic" / "study.yaml").read_text()
    assert not {"workload.data.path", "tag.host"} & set(archive.restored(folder).trials)
    assert archive.check(folder) == []
    made = find(archive.restored(folder))
    assert made.comparison.pairs == find(runs.read("synthetic", synthetic_store)).comparison.pairs
    (folder / "table.md").write_text((folder / "table.md").read_text().replace("AdamWR", "AdamWX", 1))
    assert archive.check(folder) == ["table.md"]
