"""The report of a synthetic study, and of every study that has not enough in it."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from analysis import runs
from analysis.report import escape_latex, report
from harness import study, tracking
from harness.config import BadInput, Trial
from harness.store import Store
from tests import synthetic

FILES = {"report.html", "table.md", "table.csv", "table.tex", "summary.json"}
FIGURES = {"result", "error_by_epoch", "anytime", "schedule", "budgets", "gap"}


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def folder(synthetic_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the synthetic study."""
    store = shutil.copytree(synthetic_store, tmp_path_factory.mktemp("report") / "runs")
    return report("synthetic", store, undelivered=["0123456789ab: MLflow at http://tracking & co was <down>"]).parent


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


class Page(html.parser.HTMLParser):
    """What a reader sees and what the page would fetch; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.fetched, self.ids, self._open = "", [], [], list[str]()  # type: ignore[var-annotated]
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        given = dict(attributes)
        self.fetched += [v for k, v in given.items() if k in ("src", "href", "srcset", "data") and v]
        self.ids += [given["id"]] if given.get("id") else []
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data + " "


# ----------------------------------------------------------------------------------------------- the files


def test_all_files_are_there(folder: Path) -> None:
    assert folder.parts[-2:] == ("synthetic", "report")
    assert {p.name for p in folder.iterdir()} == FILES | {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}


def test_summary_has_the_shape_of_the_contract(folder: Path) -> None:
    found = summary(folder)
    assert (found["study"], found["workload"]) == ("synthetic", "mnist5k_cnn")
    assert list(found["arms"]) == ["AdamWR", "SGDWR"]
    for arm in found["arms"].values():
        assert set(arm) == {"n", "failed", "missing", "diverged", "best_trial_id", "error_points", "ci95"}
        assert arm["ci95"][0] < arm["error_points"] < arm["ci95"][1]
    counts = {name: (a["n"], a["failed"], a["missing"], a["diverged"]) for name, a in found["arms"].items()}
    assert counts == {"AdamWR": (3, 1, 2, 0), "SGDWR": (5, 0, 0, 1)}
    assert [(p["a"], p["b"], p["method"], p["n"]) for p in found["pairs"]] == [
        ("AdamWR", "SGDWR", "welch", 3),
        ("AdamWR", "SGDWR", "paired", 3),
    ]
    for pair in found["pairs"]:
        assert set(pair) == {"a", "b", "n", "method", "diff_points", "ci95", "verdict", "declared", "family", "ci95_simultaneous"}
        assert pair["verdict"] in {"better", "worse", "equivalent", "undecided"}
    assert found["imagenet"] == "ImageNet: not measured."
    assert list(found["answers"]) == [
        "Does decoupled weight decay pay?",
        "Is Adam with decoupled decay behind SGD with it?",
        "Is what remains only insufficient tuning?",
    ]
    assert found["answers"]["Does decoupled weight decay pay?"].startswith("Not answered by this study")
    assert any("Heat maps" in line for line in found["not_told"])


def test_the_numbers_are_the_journals(folder: Path) -> None:
    """From the journals by hand: mean error of SGDWR's finalists at the end of the budget."""
    store = Store(folder.parent.parent)
    errors = []
    for trial in store.trials("synthetic"):
        config = trial.read_config()
        if (config.arm, config.phase) == ("SGDWR", "finalists"):
            errors.append(100 * (1 - trial.state().answer["anytime/val_top1"]))
    assert len(errors) == 5
    assert summary(folder)["arms"]["SGDWR"]["error_points"] == pytest.approx(sum(errors) / 5, rel=1e-9)


def test_the_tables_agree_with_the_summary(folder: Path) -> None:
    found = summary(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [row["kind"] for row in rows] == ["arm", "arm", "difference", "difference"]
    for row, arm in zip(rows, found["arms"].values(), strict=False):
        assert float(row["points"]) == arm["error_points"]
        assert [float(row["ci95_low"]), float(row["ci95_high"])] == arm["ci95"]
        assert int(row["planned"]) == int(row["finished"]) + int(row["failed"]) + int(row["diverged"]) + int(row["missing"])
    assert [row["verdict"] for row in rows[2:]] == [pair["verdict"] for pair in found["pairs"]]
    error = f"{found['arms']['AdamWR']['error_points']:.2f}"
    for name in ("table.md", "table.tex", "report.html"):
        assert error in (folder / name).read_text(), name


def test_the_page_is_whole_and_needs_no_network(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert len(page.fetched) == len(FIGURES)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.fetched)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|url\(", (folder / "report.html").read_text())
    for name in FIGURES:
        assert "http" not in re.sub(
            r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', "", (folder / f"{name}.svg").read_text(), flags=re.S
        )


def test_the_page_says_what_there_is_to_say(folder: Path) -> None:
    text = " ".join(Page(folder / "report.html").text.split())
    for said in (
        "On mnist5k_cnn (1,000 validation images), AdamWR",
        "Paired over the 3 seeds that both have, seed correlation",
        "The sampling error of 1,000 images",
        "ImageNet: not measured.",
        "AdamWR: 3 of 9 planned trials without a result (1 failed, 1 missing, 1 pending)",
        "2 of 5 seeds not in the estimate: seed 1003 interrupted, seed 1004 pending",
        "SGDWR: 1 of 9 planned trials without a result (1 diverged)",
        "0123456789ab: MLflow at http://tracking & co was <down>",
        "lost <power> & 50 % of its disks",
        "Selection reads the holdout only (500 images kept out of training)",
        "Every trial (18)",
    ):
        assert said in text, said


def test_figures_are_pictures_with_something_on_them(folder: Path) -> None:
    for name in FIGURES:
        picture = Image.open(folder / f"{name}.png").convert("RGB")
        assert picture.width >= 1200
        colors = {color for _, color in picture.getcolors(1 << 24) or []}
        drawn = {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)}  # both arms; AdamWR lost a trial of its search, so it has no curve by budget
        assert (drawn if name != "budgets" else {(0xD5, 0x5E, 0x00)}) <= colors, name


def test_a_second_report_is_the_same_to_the_last_byte(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    report("synthetic", folder.parent.parent, undelivered=["0123456789ab: MLflow at http://tracking & co was <down>"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_latex_is_escaped() -> None:
    assert escape_latex(r"50 % of A_b & {c} #1 $2 ~^\ −0.1 ±") == (
        r"50 \% of A\_b \& \{c\} \#1 \$2 \textasciitilde{}\textasciicircum{}\textbackslash{} $-$0.1 $\pm$"
    )


def test_latex_rows_have_as_many_cells_as_columns(folder: Path) -> None:
    text = (folder / "table.tex").read_text()
    for spec, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.S):
        rows = re.findall(r"^(.*) \\\\$", body, flags=re.M)
        assert len(rows) >= 2
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(spec)}
    assert "mnist5k\\_cnn" in text


# ----------------------------------------------------------------------------- studies with not enough in them

Write = Callable[[Store, int, Trial], None]
Reported = Callable[[dict[str, Any], Write], Path]


@pytest.fixture
def reported(synthetic_store: Path, tmp_path: Path) -> Reported:
    """Of the study STUDY with some keys replaced: each search trial written in order, delivered, reported; the report's folder."""
    shutil.copy(synthetic_store / "mlflow.db", tmp_path)  # saves MLflow seconds of setting one up; the study there has another name

    def make(replaced: dict[str, Any], write: Write) -> Path:
        store = Store(tmp_path)
        loaded = synthetic.write_study(store, synthetic.STUDY | {"name": "scarce"} | replaced)
        for place, planned in enumerate(study.planned(loaded, {})):
            if planned.trial is not None:
                write(store, place, planned.trial)
        tracking.deliver(store, loaded.name)
        return report("scarce", tmp_path).parent

    return make


def said_by(folder: Path) -> str:
    assert {p.name for p in folder.iterdir()} >= FILES
    text = " ".join(Page(folder / "report.html").text.split())
    assert not re.search(r"\b(nan|inf|None|NaT|<NA>)\b", text.replace("train/loss is nan", "")), text
    assert "ImageNet: not measured." in text
    return text


@pytest.mark.parametrize("finalists", [None, {"top": 1, "seeds": 3}])
def test_an_empty_study(tmp_path: Path, finalists: dict[str, int] | None) -> None:
    synthetic.write_study(Store(tmp_path), synthetic.STUDY | {"finalists": finalists})
    folder = report("synthetic", tmp_path).parent
    found, text = summary(folder), said_by(folder)
    for arm in found["arms"].values():
        assert (arm["n"], arm["error_points"], arm["ci95"], arm["best_trial_id"]) == (0, None, None, None)
        assert (arm["missing"], arm["failed"], arm["diverged"]) == (4 if finalists is None else 7, 0, 0)
    assert all((p["n"], p["diff_points"], p["ci95"], p["verdict"]) == (0, None, None, "undecided") for p in found["pairs"])
    assert "AdamWR and SGDWR cannot be compared: AdamWR: no value." in text
    assert "No error was measured." in text


def test_a_single_trial(reported: Reported) -> None:
    replaced = {"arms": {"AdamWR": synthetic.STUDY["arms"]["AdamWR"]}, "search": {"points": 1, "seeds": 1}, "finalists": None}
    folder = reported(replaced, lambda store, _, trial: synthetic.write_trial(store, trial))
    found, text = summary(folder), said_by(folder)
    assert found["pairs"] == []
    assert found["arms"]["AdamWR"]["n"] == 1
    assert found["arms"]["AdamWR"]["ci95"] is None
    assert 3 < found["arms"]["AdamWR"]["error_points"] < 8
    assert "optimistic" not in text  # a single configuration was not chosen


def test_every_trial_failed(reported: Reported) -> None:
    folder = reported(
        {"search": {"points": 2, "seeds": 1}}, lambda store, _, trial: synthetic.write_trial(store, trial, "failed", until=0.3)
    )
    found, text = summary(folder), said_by(folder)
    assert {(a["n"], a["failed"], a["error_points"]) for a in found["arms"].values()} == {(0, 2, None)}
    assert "AdamWR: the search has not decided the finalists yet" in text or "no trial of phase" in text
    assert "lost <power>" in text


def test_every_trial_diverged(reported: Reported) -> None:
    folder = reported(
        {"search": {"points": 2, "seeds": 1}, "finalists": None},
        lambda store, _, trial: synthetic.write_trial(store, trial, "diverged", until=0.3),
    )
    found = summary(folder)
    said_by(folder)
    assert {(a["n"], a["diverged"], a["error_points"], a["ci95"]) for a in found["arms"].values()} == {(0, 2, None, None)}
    assert {p["verdict"] for p in found["pairs"]} == {"undecided"}


@pytest.mark.parametrize("without", [("val/", "anytime/val"), ("holdout/", "anytime/holdout"), ("val/", "holdout/", "anytime/", "train")])
def test_a_missing_metric(reported: Reported, without: tuple[str, ...]) -> None:
    folder = reported(
        {"search": {"points": 2, "seeds": 1}, "finalists": None},
        lambda store, _, trial: synthetic.write_trial(store, trial, without=without),
    )
    found, text = summary(folder), said_by(folder)
    assert {(a["error_points"], a["ci95"]) for a in found["arms"].values()} == {(None, None)}
    assert re.search(r"anytime/(val|holdout)_top1 is missing", text)
    assert {p["verdict"] for p in found["pairs"]} == {"undecided"}


def test_nan_and_inf_in_the_record(reported: Reported) -> None:
    """A store whose finished trials carry values that are no numbers: said, and never averaged."""

    def write(store: Store, place: int, trial: Trial) -> None:
        synthetic.write_trial(store, trial, final=0.05)
        value = {0: "NaN", 1: "Infinity"}.get(place)
        path = store.trial(trial.study, trial.trial_id).journal
        if value:
            path.write_text(re.sub(r'("anytime/val_top1":)[0-9.]+', rf"\1{value}", path.read_text()))

    folder = reported({"search": {"points": 1, "seeds": 3}, "finalists": None}, write)
    found, text = summary(folder), said_by(folder)
    assert found["arms"]["AdamWR"]["n"] == 1
    assert found["arms"]["AdamWR"]["ci95"] is None
    assert math.isfinite(found["arms"]["AdamWR"]["error_points"])
    assert found["arms"]["SGDWR"]["n"] == 3
    assert "AdamWR: anytime/val_top1 is missing for finished seeds 0, 1" in text


def test_a_search_too_small_for_budgets_is_told_how_many_points_it_takes(reported: Reported) -> None:
    replaced = {"search": {"points": 2, "seeds": 1}, "finalists": None}
    folder = reported(replaced, lambda store, _, trial: synthetic.write_trial(store, trial))
    assert "needs a search of 4 points or more in both" in said_by(folder)


def test_pictures_of_an_older_report_go_and_a_users_files_stay(reported: Reported, tmp_path: Path) -> None:
    (tmp_path / "scarce" / "report").mkdir(parents=True)
    for name in ("gap.png", "gap.svg", "gap.pdf", "mine.png"):
        (tmp_path / "scarce" / "report" / name).touch()
    folder = reported({"search": {"points": 1, "seeds": 1}, "finalists": None}, lambda *_: None)
    assert {p.name for p in folder.iterdir()} & {"gap.png", "gap.svg", "gap.pdf", "mine.png", "result.png"} == {
        "gap.pdf",
        "mine.png",
        "result.png",
    }


def test_the_search_still_runs_and_nothing_is_invented_for_the_finalists(reported: Reported) -> None:
    def write(store: Store, place: int, trial: Trial) -> None:
        if place < 2:
            synthetic.write_trial(store, trial)

    folder = reported({}, write)
    assert summary(folder)["arms"]["AdamWR"]["error_points"] is None
    assert "AdamWR: the search has not decided the finalists yet" in said_by(folder)


def test_a_study_without_finalists_says_that_it_is_optimistic(synthetic_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(synthetic_store, tmp_path / "runs")
    synthetic.write_study(Store(store), synthetic.STUDY | {"finalists": None})
    folder = report("synthetic", store).parent
    text = said_by(folder)
    assert "AdamWR: chosen and reported on the same runs (no finalists with fresh seeds): optimistic" in text
    assert "counted nowhere: 8 trials in the store" not in text  # 9: one never started
    assert "not of the study as it stands now, and counted nowhere: 9 trials in the store" in text
    assert "6 of 8 planned trials searched without val, since finalists were configured then; keep finalists" in text
    # its search was run with finalists to follow, so that nobody saw the validation split
    assert summary(folder)["arms"]["SGDWR"]["n"] == 0
    assert "SGDWR: anytime/val_top1 is missing for finished seed 0" in text


def test_what_mlflow_lacks_is_listed(synthetic_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(synthetic_store, tmp_path / "runs")
    (store / "mlflow.db").unlink()
    folder = report("synthetic", store).parent
    lines = summary(folder)["undelivered"]
    assert len(lines) == 17
    assert all("no run in MLflow" in line for line in lines)
    assert "MLflow and the journals differ:" in said_by(folder)
    assert {arm["error_points"] for arm in summary(folder)["arms"].values()} == {None}


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither in the store"):
        report("nothing", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_writes_nothing_but_what_it_keeps(synthetic_store: Path) -> None:
    def everything() -> dict[str, tuple[int, int]]:
        files = (p for p in synthetic_store.rglob("*") if p.is_file() and p.parent != synthetic_store / "synthetic" / "cache")
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before = everything()
    runs.read("synthetic", synthetic_store).check()
    assert everything() == before
