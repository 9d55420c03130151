"""What MLflow's UI is told to show, without MLflow: whether the UI understands it is for tests/ui."""

from __future__ import annotations

import json

from harness import ui
from tests.trials import trial


def test_a_run_is_named_by_arm_phase_point_and_seed() -> None:
    finalist = trial(arm="AdamWR", phase="finalists", seed=1000)
    assert ui.run_name(finalist) == f"AdamWR finalists {ui.point(finalist)} seed 1000"


def test_a_point_is_one_configuration_with_every_seed_in_every_phase() -> None:
    first = trial(arm="AdamWR", seed=0)
    assert ui.point(first) == first.trial_id[:8]
    assert ui.point(trial(arm="AdamWR", phase="finalists", seed=1000)) == ui.point(first)
    assert ui.point(trial(arm="AdamWR", optimizer={"name": "adam", "lr": 2e-3})) != ui.point(first)


def test_views_are_as_mlflow_saves_them_in_the_order_of_the_menu() -> None:
    """A name, two times and the state as text, within what every MLflow from 3.13 on takes in a tag of an experiment."""
    tags = ui.experiment_tags(1_700_000_000_000)
    views = {key.removeprefix("mlflow.sharedViewState."): json.loads(value) for key, value in tags.items() if "View" in key}
    assert ui.BY_ARM in views and all(len(value) <= 5000 for value in tags.values())
    newest_first = sorted(views.values(), key=lambda view: -view["createdAt"])
    assert [view["name"] for view in newest_first] == ["By arm", "By epoch", "Not finished"]
    assert all(set(view) == {"name", "createdAt", "updatedAt", "state"} for view in views.values())
    assert json.loads(views[ui.BY_EPOCH]["state"])["globalLineChartConfig"]["selectedXAxisMetricKey"] == "epoch"
    assert json.loads(views[ui.BY_ARM]["state"])["groupBy"]["groupByKeys"][0] == {"mode": "tag", "groupByData": "arm"}


def test_the_address_of_a_study() -> None:
    assert ui.address("http://h:5000/", "7") == (
        "http://h:5000/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=by-arm"
    )
