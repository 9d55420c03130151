from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.store import Store
from tests import synthetic
from tests.mlflow_server import Server
from tests.ui.browser import INSTALL, PROGRAMS, Browser

NAME = "tiny"

STUDY = synthetic.STUDY | {
    "name": NAME,
    "ranks": 1,
    "search": {"points": 2, "seeds": 1},
    "finalists": {"top": 1, "seeds": 2},
    "budget": {"epochs": 7, "global_batch_size": 100},
}
"""8 trials of 49 steps"""


@pytest.fixture(scope="session")
def installed() -> None:
    """Chromium and its driver are here; else the test is skipped, and fails where that would go unseen."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        reason = f"not installed: {', '.join(absent)}; {INSTALL}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def store(installed: None, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With a study that was trained and reported, by the commands that people use."""
    folder = tmp_path_factory.mktemp("ui")
    data = {"path": str(few), "name": "few", "train_samples": 800, "holdout_per_class": 10, "val_samples": 200}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | {"workload": {"name": "mnist5k_cnn", "data": data}}))
    store = Store(folder / "runs")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    for command in (("study", "submit", str(file), "--cluster", "debug"), ("report", str(file))):
        done = subprocess.run(
            [sys.executable, "-m", "launch", *command, "--store", str(store.root)], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    return store


@pytest.fixture(scope="session")
def server(store: Store) -> Iterator[Server]:
    """`wrbench ui` on the store."""
    with Server(store.root) as server:
        server.start()
        yield server


@pytest.fixture(scope="session")
def browser(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "chromedriver.log") as browser:
        browser.open(server.url)
        browser.click("[data-component-id='mlflow.assistant.chat_panel.close']")  # opens itself in a new profile, and takes a third
        yield browser
