"""What people see of a study in MLflow's UI: names of runs, a description, and saved views, all of them things that the UI reads itself.

A saved view is a tag of the experiment, as MLflow's own "Save view" writes it: it stands in the Views menu of everybody who opens the
study, and has an address. The UI keeps columns, groups and the axis of charts in the browser otherwise, where each reader sets them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.config import Trial

BY_ARM = "by-arm"
"""the view that `address` opens"""

_VIEW, _NOTE = "mlflow.sharedViewState.", "mlflow.note.content"

_NAME = "attributes.`Run Name`"
_COLUMNS = [
    "tags.`state`",
    *(f"metrics.`{metric}`" for metric in ("epoch", "anytime/holdout_top1", "anytime/val_top1", "val/top1")),
    *(f"params.`{param}`" for param in ("optimizer.lr", "decay.weight_decay")),
    *(f"tags.`{tag}`" for tag in ("arm", "phase", "point", "seed")),
]

_BY_EPOCH = {"xAxisKey": "metric", "selectedXAxisMetricKey": "epoch"}
"""steps are not comparable between batch sizes; every value stands at a step that has an epoch"""

_VAL_TOP1 = {
    "type": "LINE", "uuid": "val-top1", "metricSectionId": "first", "metricKey": "val/top1", "displayName": "val/top1",
    "isGenerated": False, "deleted": False, "runsCountToCompare": 10, "scaleType": "linear", "xAxisScaleType": "linear", **_BY_EPOCH,
    "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "lineSmoothness": 0, "yAxisKey": "metric", "yAxisExpressions": [],
    "ignoreOutliers": False, "range": {},
}  # fmt: skip

_FIRST_SECTION = {
    "uuid": "first", "name": "val/top1 by epoch", "columns": 1,
    "display": True, "isReordered": True, "deleted": False, "isGenerated": False,
}  # fmt: skip

_COMMON: Mapping[str, Any] = {
    "selectedColumns": _COLUMNS, "columnOrder": [_NAME, *_COLUMNS], "columnWidths": {_NAME: 320}, "runsHiddenMode": "SHOW_ALL",
    "globalLineChartConfig": {**_BY_EPOCH, "lineSmoothness": 0},
    "compareRunCharts": [_VAL_TOP1], "compareRunSections": [_FIRST_SECTION], "isAccordionReordered": True,
}  # fmt: skip

_BY_ARM_AND_PHASE = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": tag} for tag in ("arm", "phase")]}

_VIEWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    BY_ARM: ("By arm", {**_COMMON, "groupBy": _BY_ARM_AND_PHASE}),
    "every-run": ("Every run", _COMMON),
    "not-finished": ("Not finished", {**_COMMON, "searchFilter": "tags.state != 'finished'"}),
}
"""id -> (name in the menu, what differs from the UI's defaults)"""

NOTE = """\
A run is a trial, named by its arm, phase, point (the same for all seeds of a configuration) and seed. The **Views** menu has the runs
by arm, every run, and those that have not finished; their charts are by epoch. The line of a group is the mean of those of its runs that
have a value there, the band goes from the lowest to the highest.

To search: `tags.state = 'finished'`, `tags.arm = 'NAME'`, `tags.phase = 'finalists'`, `tags.point = 'POINT'`.

Configurations are chosen by `anytime/holdout_top1`; `val/*` decides nothing. The run *report* holds the study's report.
"""


def run_name(trial: Trial) -> str:
    """'AdamWR finalists 5f3a91c2 seed 1000': arm, phase, point, seed."""
    return f"{trial.arm} {trial.phase} {point(trial)} seed {trial.seed}"


def point(trial: Trial) -> str:
    """8 hex digits, the same for every seed of a configuration: the beginning of its trial id at seed 0."""
    return trial.model_copy(update={"seed": 0}).trial_id[:8]


def experiment_tags(created: int) -> dict[str, str]:
    """The tags of a study's experiment: its description and its views. created: milliseconds since 1970, when the views were."""
    tags = {_NOTE: NOTE}
    for place, (name, (title, state)) in enumerate(_VIEWS.items()):
        at = created - place  # the menu has the newest first
        tags[_VIEW + name] = json.dumps({"name": title, "createdAt": at, "updatedAt": at, "state": json.dumps(state)})
    return tags


def address(server: str, experiment_id: str) -> str:
    """Where a study's runs are shown by arm. Without the type of workflow a fresh browser is shown traces, of which there are none."""
    asked = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={BY_ARM}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{asked}"
