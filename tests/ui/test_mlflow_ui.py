"""A finished study as MLflow's own UI shows it, in a real Chromium whose profile is new: nobody has set anything up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from analysis import runs
from harness import ui
from harness.store import Store
from tests.mlflow_server import Server
from tests.ui.browser import Browser
from tests.ui.conftest import NAME, STUDY

PICTURE = Path("build/ui.png")
"""what analysis/README.md shows of it is a copy of this"""


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    """That `wrbench ui` prints for the study."""
    (line,) = [line for line in server.log.read_text().splitlines() if line.startswith(f"  {NAME}: ")]
    return line.removeprefix(f"  {NAME}: ")


@pytest.fixture(scope="module")
def names(store: Store) -> dict[str, str]:
    """Name that a run should have -> state of its trial."""
    trials = {folder.path.name: folder for folder in store.trials(NAME)}
    table = runs.trials(NAME, store.root)
    return {ui.run_name(trials[row["trial_id"]].read_config()): row["state"] for row in table.to_dict("records")}


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    yield browser
    browser.chrome.switch_to.default_content()


def listed(page: Browser) -> list[str]:
    """The names of the runs in the table."""
    return sorted(page.texts(".ag-root a[href*='/runs/']"))


def lists(page: Browser, *wanted: str) -> None:
    """Waits until the table lists these runs and no other."""
    page.until(f"the runs {wanted}", lambda: listed(page) == sorted(wanted))


def without_view(address: str) -> str:
    """And without the filter that an earlier test typed, which the browser remembers."""
    return re.sub("&(compareRunsMode|viewStateShareKey)=[^&]*", "", address) + "&searchFilter="


def test_runs_are_named_by_arm_phase_point_and_seed(page: Browser, address: str, names: dict[str, str]) -> None:
    assert len(names) == 8 and set(names.values()) == {"finished"}
    assert sum(re.fullmatch(r"(AdamWR|SGDWR) search [0-9a-f]{8} seed 0", name) is not None for name in names) == 4
    page.open(without_view(address))
    lists(page, "report", *names)
    page.says("named by its arm, phase, point")  # the description of the experiment


def test_the_menu_has_a_view_by_arm_with_states_and_parameters(page: Browser, address: str, names: dict[str, str]) -> None:
    page.open(without_view(address))
    page.click("[data-testid=saved-views-trigger]", "Views")
    page.says("Not finished")
    page.click("[data-testid=saved-views-item-by-arm]", "By arm")
    for arm in STUDY["arms"]:
        for phase in ("search", "finalists"):
            page.says(f"Group: arm: {arm}, phase: {phase}")
    page.until("columns", lambda: {"state", "epoch", "val/top1", "optimizer.lr"} <= set(page.texts(".ag-header-cell")))
    page.until("states", lambda: set(page.texts(".ag-row [col-id='tags.`state`']")) - {"-"} == {"finished"})


def test_a_search_string_that_is_typed_filters(page: Browser, address: str, names: dict[str, str]) -> None:
    page.open(without_view(address))
    lists(page, "report", *names)
    for text, wanted in (
        ("tags.state = 'finished' and tags.arm = 'AdamWR'", [name for name in names if name.startswith("AdamWR ")]),
        ("tags.phase = 'finalists'", [name for name in names if " finalists " in name]),
    ):
        box = page.until("the search box", lambda: page.all("[data-testid=search-box]"))[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, Keys.ENTER)
        assert len(wanted) == 4
        lists(page, *wanted)


def drawn(page: Browser, wanted: list[list[list[float]]]) -> None:
    """Waits until the first chart has lines with these points, [x, y] each, in any order, and shows as many curves."""

    def lines() -> bool:
        found = page.script(
            "return document.querySelector('.js-plotly-plot').data.filter(t => t.mode === 'lines+markers')"
            ".map(t => [Array.from(t.x), Array.from(t.y)])"
        )
        return len(found) == len(wanted) and np.allclose(sorted(found), sorted(wanted), rtol=1e-12, atol=0)

    def curves() -> bool:
        lengths = page.script("return Array.from(document.querySelectorAll('.js-plotly-plot path.js-line')).map(p => p.getTotalLength())")
        return sum(length > 100 for length in lengths) >= len(wanted)

    page.until(f"lines through {wanted}", lines)
    page.until("curves on the page", curves)


def test_val_top1_has_a_line_an_arm_and_phase(page: Browser, address: str, store: Store) -> None:
    page.open(address)
    history = runs.history(NAME, store.root).dropna(subset="val/top1")
    means = history.groupby(["arm", "phase", "step"])["val/top1"].mean().reset_index("step").groupby(["arm", "phase"])
    drawn(page, [[group["step"].to_list(), group["val/top1"].to_list()] for _, group in means])
    for arm, phase in means.groups:
        page.says(f"arm: {arm}, phase: {phase} (val/top1)")  # the legend


def test_val_top1_is_compared_by_epoch(page: Browser, address: str, store: Store) -> None:
    page.open(address.replace(ui.BY_ARM, ui.BY_EPOCH))
    history = runs.history(NAME, store.root).dropna(subset="val/top1")
    drawn(page, [[group["epoch"].to_list(), group["val/top1"].to_list()] for _, group in history.groupby("trial_id")])

    PICTURE.parent.mkdir(exist_ok=True)
    page.chrome.save_screenshot(str(PICTURE))
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)
    assert PICTURE.stat().st_size < 300_000


def test_the_report_opens_among_the_artifacts_of_its_run(page: Browser, address: str) -> None:
    page.open(without_view(address))
    page.click(".ag-root a[href*='/runs/']", "report")
    page.says("mnist5k_cnn")  # the description: the beginning of table.md
    page.click("[role=tab]", "Artifacts")
    page.click("[artifact-name='report.html']", "report.html")
    frame = page.until("the report", lambda: page.all("iframe"))[0]
    page.chrome.switch_to.frame(frame)
    page.says("AdamWR against SGDWR")
    page.says("ImageNet: not measured.")
    assert page.until("its figures", lambda: page.script("return Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)"))
