"""What people see of a study in MLflow's UI: names of runs, a description, and saved views, all of them things that the UI reads itself.

A saved view is a tag of the experiment, as MLflow's own "Save view" writes it: it stands in the Views menu of everybody who opens the
study, and has an address. The UI keeps columns, groups and the axis of charts in the browser otherwise, where each reader sets them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.config import Trial

BY_ARM, BY_EPOCH = "by-arm", "by-epoch"
"""ids of views"""

_VIEW, _NOTE = "mlflow.sharedViewState.", "mlflow.note.content"

_NAME = "attributes.`Run Name`"
_COLUMNS = [
    "tags.`state`",
    *(f"metrics.`{metric}`" for metric in ("epoch", "anytime/holdout_top1", "anytime/val_top1", "val/top1")),
    *(f"params.`{param}`" for param in ("optimizer.lr", "decay.weight_decay")),
    *(f"tags.`{tag}`" for tag in ("arm", "phase", "point", "seed")),
]

_EPOCH = {"xAxisKey": "metric", "selectedXAxisMetricKey": "epoch"}
_STEP = {"xAxisKey": "step", "selectedXAxisMetricKey": ""}
"""for means over groups: there MLflow 3.17 takes the first epochs logged for those of the values, which are fewer"""


def _view(x_axis: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Columns, and charts against `x_axis`, val/top1 before all others."""
    card = {
        "type": "LINE", "uuid": "val-top1", "metricSectionId": "first", "metricKey": "val/top1", "displayName": "val/top1",
        "isGenerated": False, "deleted": False, "runsCountToCompare": 10, "scaleType": "linear", "xAxisScaleType": "linear", **x_axis,
        "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "lineSmoothness": 0, "yAxisKey": "metric", "yAxisExpressions": [],
        "ignoreOutliers": False, "range": {},
    }  # fmt: skip
    section = {
        "uuid": "first", "name": "val/top1 (reported)", "columns": 1,
        "display": True, "isReordered": True, "deleted": False, "isGenerated": False,
    }  # fmt: skip
    return {
        "selectedColumns": _COLUMNS, "columnOrder": [_NAME, *_COLUMNS], "columnWidths": {_NAME: 320}, "runsHiddenMode": "SHOW_ALL",
        "globalLineChartConfig": {**x_axis, "lineSmoothness": 0}, "compareRunCharts": [card], "compareRunSections": [section],
        "isAccordionReordered": True, **more,
    }  # fmt: skip


_BY_ARM_AND_PHASE = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": tag} for tag in ("arm", "phase")]}

_VIEWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    BY_ARM: ("By arm", _view(_STEP, groupBy=_BY_ARM_AND_PHASE)),
    BY_EPOCH: ("By epoch", _view(_EPOCH)),
    "not-finished": ("Not finished", _view(_EPOCH, searchFilter="tags.state != 'finished'")),
}
"""id -> (name in the menu, what differs from the UI's defaults)"""

NOTE = """\
A run is a trial, named by its arm, phase, point (the same for all seeds of a configuration) and seed. The **Views** menu has the runs
*by arm* and phase (charts by step, a line is the mean of those runs of a group that have a value there, its band from the lowest to the
highest), every run *by epoch*, and those that are *not finished*.

To search: `tags.state = 'finished'`, `tags.arm = 'NAME'`, `tags.phase = 'finalists'`, `tags.point = 'POINT'`.

Configurations are chosen by `anytime/holdout_top1`; `val/*` decides nothing. The run *report* holds the study's report.
"""


def run_name(trial: Trial) -> str:
    """'AdamWR finalists 5f3a91c2 seed 1000': arm, phase, point, seed."""
    return f"{trial.arm} {trial.phase} {point(trial)} seed {trial.seed}"


def point(trial: Trial) -> str:
    """8 hex digits, the same for every seed of a configuration: the beginning of Trial.configuration."""
    return trial.configuration[:8]


def experiment_tags(created: int) -> dict[str, str]:
    """The tags of a study's experiment: its description and its views. created: milliseconds since 1970, when the views were."""
    tags = {_NOTE: NOTE}
    for place, (name, (title, state)) in enumerate(_VIEWS.items()):
        at = created - place  # the menu has the newest first
        tags[_VIEW + name] = json.dumps({"name": title, "createdAt": at, "updatedAt": at, "state": json.dumps(state)})
    return tags


def address(server: str, experiment_id: str) -> str:
    """Where a study is, its runs by arm. Without the type of workflow a fresh browser is shown traces, of which there are none."""
    asked = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={BY_ARM}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{asked}"
