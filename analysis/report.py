"""A study's report: runs/STUDY/report/ with one self-contained page, the tables for other documents, and the figures."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from great_tables import GT
from matplotlib.figure import Figure

from analysis import figures
from analysis.compare import ArmResult, Comparison, Pair, compare, interval, scope, sentence, signed
from analysis.runs import Records, StudyName, read
from harness import schedule
from harness.store import write_atomically

PAGE = Path(__file__).with_name("report.html")
"""The page's frame: a string.Template with its style sheet."""


@dataclass(frozen=True)
class Table:
    """Rows of finished text under their headings; the first `text_columns` are words, the others numbers."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int


def report(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None, undelivered: Sequence[str] = ()) -> Path:
    """Writes STORE/STUDY/report/ from what MLflow has, checked against the journals; the path of its report.html.

    `study`, `store` and `tracking_uri` as for `runs.trials`. `undelivered`: a line each for what could not be delivered to
    MLflow before, which the report lists. Whatever is missing, failed or diverged is said; nothing is made up for it.
    Raises BadInput for a study that is not there or a store that cannot be written.
    """
    records = read(study, store, tracking_uri)
    records.store.check_writable()
    comparison = compare(records)
    complaints = [*undelivered, *(line for line in _complaints(records) if not any(u.startswith(line[:12]) for u in undelivered))]
    tables = (arms_table(comparison), pairs_table(comparison))
    drawn = _figures(records, comparison)
    vectors = {name: figures.svg(figure) for name, figure in drawn.items()}

    folder = records.store.study(records.study.name) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        (folder / f"{name}.png").write_bytes(figures.png(figure))
        (folder / f"{name}.svg").write_bytes(vectors[name])
    write_atomically(folder / "table.md", _markdown(comparison, tables))
    write_atomically(folder / "table.csv", _numbers(comparison).to_csv(index=False))
    write_atomically(folder / "table.tex", _latex(comparison, tables))
    write_atomically(folder / "summary.json", json.dumps(summary(comparison, complaints), indent=2, allow_nan=False) + "\n")
    page = folder / "report.html"
    write_atomically(page, _page(records, comparison, tables, vectors, complaints))
    return page


def summary(comparison: Comparison, undelivered: Sequence[str] = ()) -> dict[str, Any]:
    """summary.json: numbers in percentage points, null where there is none. `missing` includes what is still pending."""
    return {
        "study": comparison.study,
        "workload": comparison.workload.name,
        "arms": {
            arm.name: {
                "n": arm.error.n,
                "failed": arm.failed,
                "missing": arm.missing,
                "diverged": arm.diverged,
                "best_trial_id": arm.best_trial_id,
                "error_points": _finite(arm.error.value),
                "ci95": arm.error.interval,
            }
            for arm in comparison.arms
        },
        "pairs": [
            {
                "a": pair.a,
                "b": pair.b,
                "n": pair.difference.n,
                "method": pair.difference.method,
                "diff_points": _finite(pair.difference.value),
                "ci95": pair.difference.interval,
                "verdict": pair.difference.verdict,
            }
            for pair in comparison.pairs
        ],
        "imagenet": comparison.imagenet,
        "flags": list(comparison.flags),
        "undelivered": list(undelivered),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _complaints(records: Records) -> list[str]:
    """A line for every trial of which MLflow lacks something its journal has, or has it otherwise."""
    found = records.check()
    return [f"{row['trial_id']} ({row['arm']}): {row['says']}" for row in found[~found.agrees.astype(bool)].to_dict("records")]


def _figures(records: Records, comparison: Comparison) -> dict[str, Figure]:
    table = figures.curves(records, comparison)
    return {
        "result": figures.result(comparison),
        "error_by_epoch": figures.error_by_epoch(table, comparison),
        "anytime": figures.anytime(table, comparison),
        "schedule": figures.schedules(figures.reported(records, comparison), comparison),
    }


# --------------------------------------------------------------------------------------------------- tables


METHOD_NAMES = {"welch": "Welch", "paired": "paired by seed", "seeds x images": "seeds × images"}


def arms_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            arm.name,
            ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in arm.parameters.items()) or "—",
            str(arm.error.n),
            _points(arm.error.value, arm),
            " to ".join(f"{end:.2f}".replace("-", "−") for end in arm.error.interval) if arm.error.interval else "none",
            f"{arm.sampling.standard_error:.2f}" if arm.sampling.standard_error is not None else "—",
            _points(arm.holdout.value, arm),
            f"{arm.finished} of {arm.planned}",
            str(arm.failed),
            str(arm.diverged),
            f"{arm.missing} ({arm.pending} pending)" if arm.pending else str(arm.missing),
        )
        for arm in comparison.arms
    )
    columns = ("Arm", "Best configuration", "n", "Error (%)", "95 % interval", "Sampling error", "Holdout error (%)")
    images = f"{comparison.workload.data.val_samples:,}"
    note = (
        "Error: validation top-1 error at the end of the budget, answer of the last completed cycle, mean over n seeds of the best "
        "configuration, Student's t interval. Best: by mean holdout error. Sampling error: binomial standard error of "
        f"{images} images, in points."
    )
    return Table("arms", "Arms", note, (*columns, "Trials with a result", "Failed", "Diverged", "Missing"), rows, 2)


def pairs_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            f"{pair.a} − {pair.b}",
            METHOD_NAMES[pair.difference.method] + (", declared" if pair.declared else ""),
            pair.difference.verdict,
            str(pair.difference.n) if pair.difference.method == "paired" else f"{pair.difference.n_a}, {pair.difference.n_b}",
            signed(pair.difference.value) if math.isfinite(pair.difference.value) else "—",
            interval(pair.difference.interval) if pair.difference.interval else "none",
            interval(pair.difference.interval90) if pair.difference.interval90 else "none",
            f"{pair.difference.correlation:.2f}".replace("-", "−") if pair.difference.correlation is not None else "—",
        )
        for pair in comparison.pairs
    )
    margin = max((pair.difference.margin for pair in comparison.pairs), default=0.0)
    note = (
        "Points of error, below zero the first arm is better. better, worse: the 95 % interval excludes 0; equivalent: the 90 % interval "
        f"lies within ±{margin:g} points (two one-sided tests at 5 %); else undecided. Seed correlation: over the seeds both arms have."
    )
    columns = ("Difference", "Method", "Verdict", "n", "Points", "95 % interval", "90 % interval", "Seed correlation")
    return Table("differences", "Differences", note, columns, rows, 3)


def _trials_table(records: Records) -> Table:
    rows = tuple(
        (
            str(row["arm"]),
            str(row["phase"]),
            row["trial_id"] if isinstance(row["trial_id"], str) else "undecided",
            row["state"] if row["planned"] else f"{row['state']}, not in the study",
            row["last_error"] if isinstance(row["last_error"], str) else "",
            str(row["seed"]),
            str(row["step"]) if pd.isna(row["total_steps"]) else f"{row['step']} of {row['total_steps']}",
            str(row["attempts"]),
            f"{100 * (1 - row['anytime/val_top1']):.2f}" if math.isfinite(row["anytime/val_top1"]) else "—",
        )
        for row in records.trials.to_dict("records")
    )
    note = "Error: validation, answer of the last cycle that the trial completed. Steps: as far as MLflow has them."
    columns = ("Arm", "Phase", "Trial", "State", "Last error", "Seed", "Steps", "Attempts", "Error (%)")
    return Table("trials", "Every trial", note, columns, rows, 5)


def _points(value: float, arm: ArmResult) -> str:
    if math.isfinite(value):
        return f"{value:.2f}"
    return "diverged" if arm.error.diverged else "—"


def _numbers(comparison: Comparison) -> pd.DataFrame:
    """table.csv: a row an arm, then a row a difference, unrounded; empty where there is no number."""
    arms = [
        {
            "kind": "arm", "name": arm.name, "method": "t", "n": arm.error.n, "points": _finite(arm.error.value),
            "ci95_low": (arm.error.interval or (None, None))[0], "ci95_high": (arm.error.interval or (None, None))[1],
            "sampling_error": arm.sampling.standard_error, "holdout_points": _finite(arm.holdout.value), "planned": arm.planned,
            "finished": arm.finished, "failed": arm.failed, "diverged": arm.diverged, "missing": arm.missing, "pending": arm.pending,
            "configuration": arm.configuration, "best_trial_id": arm.best_trial_id, "parameters": json.dumps(dict(arm.parameters)),
        }
        for arm in comparison.arms
    ]  # fmt: skip
    pairs = [
        {
            "kind": "difference", "name": f"{pair.a} - {pair.b}", "method": d.method, "n": d.n, "points": _finite(d.value),
            "ci95_low": (d.interval or (None, None))[0], "ci95_high": (d.interval or (None, None))[1],
            "n_a": d.n_a, "n_b": d.n_b, "correlation": d.correlation, "margin": d.margin, "verdict": d.verdict,
        }
        for pair in comparison.pairs
        for d in [pair.difference]
    ]  # fmt: skip
    counts = ["n", "n_a", "n_b", "planned", "finished", "failed", "diverged", "missing", "pending"]
    return pd.DataFrame([*arms, *pairs]).astype({name: "Int64" for name in counts if name in {*arms[0], *(pairs or arms)[0]}})


# ------------------------------------------------------------------------------------------------- sentences


def verdicts(comparison: Comparison) -> list[str]:
    """What may be said: a sentence a pair by the declared method with the others beside it, the scope, and ImageNet."""
    said = []
    for pair in comparison.pairs:
        if pair.declared:
            said.append(sentence(pair, comparison.workload))
        elif pair.difference.interval is not None:
            said.append(_beside(pair))
    return [*said, scope(comparison), comparison.imagenet]


def _beside(pair: Pair) -> str:
    d = pair.difference
    correlation = f", seed correlation {d.correlation:.2f}".replace("-", "−") if d.correlation is not None else ""
    found = interval(d.interval) if d.interval else "none"
    how = {
        "welch": f"By Welch's method, n = {d.n_a} and {d.n_b} seeds",
        "paired": f"Paired over the {d.n} seeds that both have{correlation}",
        "seeds x images": f"For other seeds and other images, n = {d.n_a} and {d.n_b} seeds",
    }[d.method]
    return f"{how}: {signed(d.value)} points, 95 % interval {found}, {d.verdict}."


def protocol(records: Records, comparison: Comparison) -> list[str]:
    """What was tuned on what: a line each."""
    data, study = comparison.workload.data, records.study.study
    trial = next(iter(records.configs.values()))
    searched = ", ".join(f"{arm.name} {arm.searched}" for arm in comparison.arms)
    lines = [
        f"Workload {comparison.workload.name}: {data.name}, trained on {data.trained_samples:,} images, {comparison.workload.model.name}.",
        f"Budget: {trial.budget.epochs:g} epochs at batch {trial.budget.global_batch_size} = {schedule.total_steps(trial)} steps a trial.",
        f"Search ({study.sampler.name}): configurations {searched}; {len(study.search.seeds)} seed(s) each.",
    ]
    if study.finalists:
        lines.append(
            f"Finalists: the {study.finalists.top} best of each arm by mean holdout accuracy, run again with seeds "
            f"{', '.join(map(str, study.finalists.seeds))}, none of them a seed of the search."
        )
    else:
        lines.append("No finalists: the best configuration is reported on the runs that chose it.")
    lines.append(
        f"Selection reads the holdout only ({data.holdout_samples:,} images kept out of training); a diverged run counts as worst, a "
        f"failed one is left out. The validation split ({data.val_samples:,} images) is reported and decides nothing."
    )
    return lines


# --------------------------------------------------------------------------------------- Markdown and LaTeX


def _markdown(comparison: Comparison, tables: Sequence[Table]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*_<>`\[\]])", r"\\\1", cell) for cell in cells) + " |"

    parts = [f"# {comparison.study}: {comparison.workload.name}", *verdicts(comparison)]
    for table in tables:
        rule = "|" + "|".join(" --- " if i < table.text_columns else " ---: " for i in range(len(table.columns))) + "|"
        parts += [f"## {table.title}", "\n".join([line(table.columns), rule, *map(line, table.rows)]), table.note]
    if comparison.flags:
        parts += ["## To bear in mind", "\n".join(f"- {flag}" for flag in comparison.flags)]
    return "\n\n".join(parts) + "\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "±": r"$\pm$", "—": "---", "–": "--",
}  # fmt: skip


def escape_latex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


def _latex(comparison: Comparison, tables: Sequence[Table]) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
        rows = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in table.rows]
        head = " & ".join(map(escape_latex, table.columns)) + r" \\"
        caption = f"\\caption{{{escape_latex(f'{comparison.study}, {comparison.workload.name}: {table.title.lower()}. {table.note}')}}}"
        body = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        label = f"\\label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', comparison.study)}-{table.name}}}"
        parts.append("\n".join([r"\begin{table}", r"\centering", caption, label, *body, r"\end{table}"]))
    parts.append("\n".join("% " + line for line in verdicts(comparison)))
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- HTML

CAPTIONS = {
    "result": "Left: each seed, the mean and its 95 % interval. Right: each difference with its 95 % interval, filled by the "
    "study's declared method, open by others; the band is the margin of equivalence.",
    "error_by_epoch": "Validation error of the reported configurations by epoch, after every evaluation: mean over seeds, band from the "
    "lowest to the highest seed. Large markers: the end of a cycle.",
    "anytime": "Validation error of the answer at hand, the solution at the end of the last completed cycle (none before the first): "
    "mean over seeds, band from the lowest to the highest seed.",
    "schedule": "Multiplier η of the base learning rate and weight decay λ by epoch, as configured; equal schedules coincide.",
}


def _page(
    records: Records, comparison: Comparison, tables: Sequence[Table], vectors: Mapping[str, bytes], complaints: Sequence[str]
) -> str:
    said = verdicts(comparison)
    shown = "\n".join(_figure(number, name, svg) for number, (name, svg) in enumerate(vectors.items(), start=1))
    trials = _trials_table(records)
    delivered = "MLflow has every final point of every journal." if not complaints else "MLflow and the journals differ:"
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{comparison.study}: {comparison.workload.name}"),
        subtitle=html.escape(" against ".join(arm.name for arm in comparison.arms)),
        verdicts="\n".join(f"<p>{html.escape(line)}</p>" for line in said),
        tables="\n".join(f"{_heading(number, table)}\n{_html_table(table)}" for number, table in enumerate(tables, start=1)),
        flags=_list(comparison.flags) if comparison.flags else "<p>Nothing.</p>",
        figures=shown,
        protocol=_list(protocol(records, comparison)),
        delivery=f"<p>{delivered}</p>\n{_list(complaints) if complaints else ''}",
        trials=f"<p class=note>{html.escape(trials.note)}</p>\n{_html_table(trials)}",
        number_of_trials=str(len(trials.rows)),
    )


def _heading(number: int, table: Table) -> str:
    return f"<h3>Table {number}. {html.escape(table.title)}</h3>\n<p class=note>{html.escape(table.note)}</p>"


def _html_table(table: Table) -> str:
    """The table by great-tables, which escapes cells; column names are made unique on the page, they become ids."""
    names = [f"{table.name}-{i}" for i in range(len(table.columns))]
    frame = pd.DataFrame([list(row) for row in table.rows], columns=names)
    made = (
        GT(frame, id=table.name)
        .cols_label(dict(zip(names, table.columns, strict=True)))
        .cols_align("left", columns=names[: table.text_columns])
        .cols_align("right", columns=names[table.text_columns :])
        .tab_options(table_width="100%", table_font_size="0.86rem", table_font_names=["system-ui", "sans-serif"], data_row_padding="5px")
    )
    return f'<div class="wide">{made.as_raw_html()}</div>'


def _figure(number: int, name: str, svg: bytes) -> str:
    source = base64.b64encode(svg).decode()
    caption = html.escape(CAPTIONS[name])
    image = f'<img src="data:image/svg+xml;base64,{source}" alt="{caption}">'
    return f'<figure id="{name}"><div class="wide">{image}</div><figcaption><b>Figure {number}.</b> {caption}</figcaption></figure>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>"
