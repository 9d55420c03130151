"""What a study's records allow to say, on studies whose truth is known: maps, searches, the course of training, the archive."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import archive, runs
from analysis.findings import Findings, find
from analysis.report import report
from harness import correct, study, tracking
from harness.store import Store, TrialFolder
from tests import synthetic


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


def test_points_that_have_no_place_on_a_map_are_counted(tmp_path: Path) -> None:
    lr, adamw, store = {"optimizer.lr": {"choice": [0.001, 0.002, 0.004]}}, synthetic.MAPS["arms"]["AdamW"], Store(tmp_path / "runs")
    arms = {
        "AdamW": adamw | {"space": lr | {"decay.weight_decay": {"choice": [0, 0.001, 0.01]}}},
        "undecayed": adamw | {"optimizer": {"name": "adam", "eps": 1e-6}, "space": lr | {"decay.weight_decay": {"choice": [0]}}},
    }
    loaded = synthetic.write_study(store, synthetic.MAPS | {"arms": arms})
    for planned in study.planned(loaded, {}):
        assert planned.trial is not None
        synthetic.write_trial(store, planned.trial, final=0.05)
    tracking.deliver(store, loaded.name)
    records = runs.read(loaded.name, store.root)
    found = find(records)
    assert [(m.arm, m.errors.shape) for m in found.maps] == [("AdamW", (3, 2, 2))]
    assert found.off_axes == {"AdamW": 3, "undecayed": 3}
    assert "Maps: logarithmic axes have no place for 3 configurations of undecayed with a learning rate or a decay of 0." in found.missing
    rows = records.trials[records.trials.arm == "undecayed"]
    overrides = [f"arms={json.dumps({'undecayed': arms['undecayed']})}", "analysis.comparisons=null"]
    found = find(replace(records, study=study.load(store.study("maps") / "study.yaml", overrides), trials=rows))
    assert found.maps == () and found.off_axes == {"undecayed": 3}
    assert any("no arm searches a grid over exactly optimizer.lr and decay.weight_decay, above 0" in line for line in found.missing)
    assert "(sampler grid over optimizer.lr and decay.weight_decay, above 0)" in found.answers[0].text


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


def test_another_processor_makes_the_same_report() -> None:
    """Its linear algebra by instructions without AVX adds in another order, which changes the last digits of what is fitted."""
    made = "from pathlib import Path; from analysis import archive; print(archive.check(archive.RESULTS / 'mnist5k_maps'))"
    older = {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL"}
    run = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, env={**os.environ, **older})
    assert run.stdout.strip() == "[]", run.stderr


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


def ran(store: Path, document: dict[str, Any]) -> tuple[runs.Records, study.LoadedStudy]:
    """The records of a study of which all has finished, with the finalists' bits."""
    there = Store(store)
    loaded = synthetic.write_study(there, document)
    for trial in (p.trial for p in study.planned(loaded, {}) if p.trial is not None):
        synthetic.write_trial(there, trial, final=0.05)
    for trial in (p.trial for p in study.planned(loaded, there.results(loaded.name)) if p.trial and p.phase == "finalists"):
        synthetic.write_trial(there, trial, final=0.05 if trial.arm == "AdamWR" else 0.06)
        correct.write(there.trial(loaded.name, trial.trial_id), "val", 244, bits_of(there.trial(loaded.name, trial.trial_id)))
    tracking.deliver(there, loaded.name)
    return runs.read(loaded.name, store), loaded


def bits_of(folder: TrialFolder) -> np.ndarray:
    """As many images right as the journal's last answer says: each arm has hard images of its own, the same for all its seeds."""
    answer = folder.state().answer["anytime/val_top1"]
    right = np.arange(1000) < round(1000 * answer)
    return np.random.default_rng(zlib.crc32(folder.read_config().arm.encode())).permutation(right)


def test_images_edges_nested_arms_and_costs(tmp_path: Path) -> None:
    adam, sgd = synthetic.STUDY["arms"]["AdamWR"], synthetic.STUDY["arms"]["SGDWR"]
    freed = adam | {"space": adam["space"] | {"optimizer.eps": {"log_uniform": [1e-8, 1e-2]}}}
    spared = sgd | {"decay": {"name": "decoupled", "normalised": True, "exempt_1d": True}}
    document = synthetic.STUDY | {
        "arms": {"AdamWR": adam, "Freed": freed, "SGDWR": spared},
        "search": {"points": 4, "seeds": 1},
        "finalists": {"top": 1, "seeds": 3},
        "analysis": {"method": "paired", "margin": 0.5, "comparisons": [["AdamWR", "SGDWR"]]},
    }
    records, loaded = ran(tmp_path / "runs", document)
    found = find(records)
    assert [(p.a, p.b, p.difference.method, p.declared) for p in found.comparison.pairs] == [
        ("AdamWR", "SGDWR", "paired", True),
        ("AdamWR", "SGDWR", "welch", False),
        ("AdamWR", "SGDWR", "seeds x images", False),
    ]
    declared, welch, over_images = (p.difference for p in found.comparison.pairs)
    assert declared.margin == 0.5 and over_images.value == pytest.approx(welch.value)
    assert over_images.standard_error is not None and welch.standard_error is not None
    assert over_images.standard_error > 1.2 * welch.standard_error  # the images are another source of chance
    assert found.searches.nested == (("Freed", "AdamWR"),)
    assert ("Freed", "AdamWR") in found.searches.noninferior

    flags = " ".join(found.comparison.flags)
    assert "unequal search: dimensions: AdamWR 2, Freed 3, SGDWR 2" in flags
    assert "decay.exempt_1d differs between the arms: AdamWR false, Freed false, SGDWR true" in flags
    for arm in found.comparison.arms:  # by hand
        trial, space = records.configs[arm.trial_ids[0]], loaded.study.arms[arm.name].space
        for key, value in study.axis_values(loaded.study.arms[arm.name], trial).items():
            low, high = space[key].log_uniform
            place = math.log(value / low) / math.log(high / low)
            assert any(line.startswith(f"{key} ") for line in arm.at_edge) == (place < 0.1 or place > 0.9), (arm.name, key, place)
        assert (f"{arm.name}: best point at the edge of its box" in flags) == bool(arm.at_edge)

    costs = {(one.arm, one.phase): one for one in found.costs}
    assert list(costs) == [(arm, phase) for arm in document["arms"] for phase in ("search", "finalists")]  # as in every other table
    assert (costs["AdamWR", "search"].trials, costs["AdamWR", "finalists"].trials) == (4, 3)
    assert costs["AdamWR", "search"].training == pytest.approx(2 * 4 * 0.05 * 241 / 3600)  # ranks x trials x the clock at its last line
    assert costs["AdamWR", "search"].repeated == 0
    synthetic.write_study(records.store, document | {"search": {"points": 2, "seeds": 1}, "finalists": None})
    fewer = find(runs.read(loaded.name, records.store.root))
    assert [(one.arm, one.phase, one.trials) for one in fewer.costs] == [(arm, "search", 2) for arm in document["arms"]]
    assert any("counted nowhere" in flag for flag in fewer.comparison.flags)


def test_bits_that_are_not_the_answers_make_no_interval(synthetic_store: Path, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(synthetic_store, tmp_path / "runs")))
    for trial in store.trials("synthetic"):
        if trial.read_config().phase == "finalists" and trial.state().state == "finished":
            correct.write(trial, "val", 244, np.zeros(1000, dtype=bool))
    found = find(runs.read("synthetic", store.root))
    assert not any(p.difference.method == "seeds x images" for p in found.comparison.pairs)
