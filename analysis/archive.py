"""The data behind a report, small enough to be kept under version control, and the report made of them again.

    FOLDER/data/STUDY/study.yaml           as it was submitted
    FOLDER/data/STUDY/trials.parquet       the table of trials
    FOLDER/data/STUDY/points.parquet       MLflow's points
    FOLDER/data/STUDY/trials/ID/correct/   the finalists' correctness bits, as in a store

`make results` renders every folder of analysis/results that has data, and compares the tables bit by bit.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

from analysis.report import render
from analysis.runs import Records, Unreadable, read
from harness.config import BadInput
from harness.correct import correct
from harness.store import ENDED, Store
from harness.study import load, planned

RESULTS = Path(__file__).parent / "results"
TABLES = ("table.md", "table.csv", "table.tex", "summary.json")
"""compared; pictures hang on the version of the drawing library and are made again only by `save`"""


def save(records: Records, folder: Path) -> None:
    """Writes FOLDER/data and the report made of it, in place of those that were there; other files of FOLDER are left alone.

    Where the images lay and which host ran a trial is not kept: neither is a result.
    """
    data = folder / "data" / records.study.name
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    document = yaml.safe_load(records.study.text())
    document["workload"]["data"]["path"] = f"data/{document['workload']['data']['name']}"
    (data / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    records.trials.drop(columns=["workload.data.path", "tag.host"], errors="ignore").to_parquet(data / "trials.parquet", index=False)
    records.points.to_parquet(data / "points.parquet", index=False)
    for trial in records.store.trials(records.study.name):
        if correct(trial, "val") is not None:
            shutil.copytree(trial.correct, data / "trials" / trial.path.name / "correct")
    _, vectors = render(restored(folder), folder)
    for name in vectors:  # the pictures are enough
        (folder / f"{name}.svg").unlink()


def restored(folder: Path) -> Records:
    """The records in FOLDER/data. Raises BadInput where they are not there."""
    data = next((path.parent for path in sorted(folder.glob("data/*/study.yaml"))), None)
    if data is None:
        raise BadInput(f"{folder}: has no data/STUDY/study.yaml; python -m analysis.archive save STUDY {folder} makes it")
    study = load(data / "study.yaml")
    trials, points = pd.read_parquet(data / "trials.parquet"), pd.read_parquet(data / "points.parquet")
    ended = trials[trials.trial_id.notna() & trials.state.isin(ENDED)]
    answers = {str(i): None if v != v else float(v) for i, v in zip(ended.trial_id, ended["anytime/holdout_top1"], strict=True)}
    configs = {p.trial.trial_id: p.trial for p in planned(study, answers) if p.trial is not None}
    return Records(study, Store(data.parent), {}, points, configs, trials)


def check(folder: Path) -> list[str]:
    """The tables that come out otherwise than they are kept."""
    with tempfile.TemporaryDirectory() as made:
        render(restored(folder), Path(made))
        return [name for name in TABLES if not filecmp.cmp(Path(made) / name, folder / name, shallow=False)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.archive", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save", help="keep a study's records and report in a folder")
    saving.add_argument("study")
    saving.add_argument("folder", type=Path)
    saving.add_argument("--store", type=Path, default=Path("runs"))
    commands.add_parser("check", help="make the tables of analysis/results again and compare them")
    arguments = parser.parse_args()
    if arguments.command == "save":
        save(read(arguments.study, arguments.store), arguments.folder)
        return 0
    folders = sorted(path.parent for path in RESULTS.glob("*/data"))
    differing = 0
    for folder in folders:
        odd = check(folder)
        differing += len(odd)
        print(f"{'ok' if not odd else 'FAIL':<7} {folder.name}: {len(TABLES)} tables, {', '.join(odd) or 'none'} differ")
    print(f"{'FAIL' if differing or not folders else 'PASS'} results: {len(folders)} studies, {differing} tables differ")
    return 1 if differing or not folders else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadInput, Unreadable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
