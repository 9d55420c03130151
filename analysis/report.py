"""A study's report: runs/STUDY/report/ with one self-contained page, the tables for other documents, and the figures."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from great_tables import GT
from matplotlib.figure import Figure

from analysis import figures
from analysis.compare import Comparison, Pair, counted, interval, published, scope, seed_correlation, sentence, signed
from analysis.findings import Findings, find
from analysis.runs import Records, StudyName, read
from analysis.tables import Table, finite, numbers, trials_table
from harness import schedule
from harness.store import write_atomically

PAGE = Path(__file__).with_name("report.html")
"""The page's frame: a string.Template with its style sheet."""

DIGITS = 10
"""significant digits of the numbers in table.csv and summary.json: processors differ in the last of the sixteen that a number has,
by the order in which their linear algebra adds, and a report made again elsewhere is to be the same file"""


def report(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None, undelivered: Sequence[str] = ()) -> Path:
    """Writes STORE/STUDY/report/ from what MLflow has, checked against the journals; the path of its report.html.

    `study`, `store` and `tracking_uri` as for `runs.trials`. `undelivered`: a line each for what could not be delivered to
    MLflow before, which the report lists. Whatever is missing, failed or diverged is said; nothing is made up for it.
    Raises BadInput for a study that is not there or a store that cannot be written.
    """
    records = read(study, store, tracking_uri)
    records.store.check_writable()
    complaints = [*undelivered, *(line for line in _complaints(records) if not any(u.startswith(line[:12]) for u in undelivered))]
    folder = records.store.study(records.study.name) / "report"
    found, vectors = render(records, folder, complaints)
    page = folder / "report.html"
    write_atomically(page, _page(records, found, found.tables(), vectors, complaints))
    return page


def render(records: Records, folder: Path, complaints: Sequence[str] = ()) -> tuple[Findings, dict[str, bytes]]:
    """Writes tables, summary and figures, all but the page, into FOLDER; what was found, and the figures as SVG."""
    found = find(records)
    tables = found.tables()
    drawn = _figures(records, found)
    vectors = {name: figures.svg(figure) for name, figure in drawn.items()}

    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES - {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}:  # of an older report
        (folder / name).unlink(missing_ok=True)
    for name, figure in drawn.items():
        (folder / f"{name}.png").write_bytes(figures.png(figure))
        (folder / f"{name}.svg").write_bytes(vectors[name])
    write_atomically(folder / "table.md", _markdown(found, tables))
    write_atomically(folder / "table.csv", numbers(found.comparison).to_csv(index=False, float_format=f"%.{DIGITS}g"))
    write_atomically(folder / "table.tex", _latex(found, tables))
    write_atomically(folder / "summary.json", json.dumps(_rounded(summary(found, complaints)), indent=2, allow_nan=False) + "\n")
    return found, vectors


def _rounded(value: Any) -> Any:
    """JSON's values, every number in it to DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def summary(found: Findings, undelivered: Sequence[str] = ()) -> dict[str, Any]:
    """summary.json: numbers in percentage points, null where there is none. `missing` includes what is still pending."""
    comparison, reference = found.comparison, found.comparison.workload.reference
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
                "error_points": finite(arm.error.value),
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
                "diff_points": finite(pair.difference.value),
                "ci95": pair.difference.interval,
                "verdict": pair.difference.verdict,
                "declared": pair.declared,
                "family": pair.difference.family,
                "ci95_simultaneous": pair.difference.simultaneous,
            }
            for pair in comparison.pairs
        ],
        "answers": {answer.question: answer.text for answer in found.answers},
        "decoupling": {
            m.arm: {
                "share": finite(m.index.share),
                "share_ci95": m.index.share_interval,
                "slope": finite(m.index.slope),
                "slope_ci95": m.index.slope_interval,
            }
            for m in found.maps
        },
        "published": reference
        and {
            "error_points": reference.top1_error,
            "source": reference.source,
            "departures": list(reference.departures),
        },
        "not_told": list(found.missing),
        "imagenet": comparison.imagenet,
        "flags": list(comparison.flags),
        "undelivered": list(undelivered),
    }


def _complaints(records: Records) -> list[str]:
    """A line for every trial of which MLflow lacks something its journal has, or has it otherwise."""
    found = records.check()
    return [f"{row['trial_id']} ({row['arm']}): {row['says']}" for row in found[~found.agrees.astype(bool)].to_dict("records")]


def _figures(records: Records, found: Findings) -> dict[str, Figure]:
    """Those of every study, then those that this one's data allow."""
    comparison = found.comparison
    table = figures.curves(records, comparison)
    drawn = {
        "result": figures.result(comparison),
        "error_by_epoch": figures.error_by_epoch(table, comparison),
        "anytime": figures.anytime(table, comparison),
        "schedule": figures.schedules(figures.reported(records, comparison), comparison),
    }
    if found.maps:
        drawn["maps"] = figures.heat_maps(found.maps)
    if found.searches.curves:
        drawn["budgets"] = figures.budget_curves(found.searches, comparison)
    if found.loss_points.table.loss.notna().any():
        drawn["gap"] = figures.gap_plot(found.loss_points.table, comparison, found.loss_points.split)
    return drawn


# ------------------------------------------------------------------------------------------------- sentences


def verdicts(comparison: Comparison) -> list[str]:
    """What may be said: a sentence a pair by the declared method with the others beside it, the scope, what was published, and ImageNet."""
    said = []
    for pair in comparison.pairs:
        if pair.declared:
            said.append(sentence(pair, comparison.workload))
        elif pair.difference.interval is not None:
            said.append(_beside(pair))
    beside = published(comparison)
    return [*said, scope(comparison), *([beside] if beside else []), comparison.imagenet]


def _beside(pair: Pair) -> str:
    d = pair.difference
    correlation = f", seed correlation {found}" if (found := seed_correlation(d)) else ""
    found = interval(d.interval) if d.interval else "none"
    how = {
        "welch": f"By Welch's method, n = {d.n_a} and {d.n_b} seeds",
        "paired": f"Paired over the {d.n} seeds that both have{correlation}",
        "seeds x images": f"For other seeds and other images, n = {d.n_a} and {d.n_b} seeds",
    }[d.method]
    together = f" ({interval(d.simultaneous)} together with the other {d.family - 1})" if d.family > 1 and d.simultaneous else ""
    return f"{how}: {signed(d.value)} points, 95 % interval {found}{together}, {d.verdict}."


def protocol(records: Records, comparison: Comparison) -> list[str]:
    """What was tuned on what: a line each."""
    data, study = comparison.workload.data, records.study.study
    trial = next(iter(records.configs.values()))
    searched = ", ".join(f"{arm.name} {arm.searched}" for arm in comparison.arms)
    lines = [
        f"Workload {comparison.workload.name}: {data.name}, trained on {data.trained_samples:,} images, {comparison.workload.model.name}.",
        f"Budget: {trial.budget.epochs:g} epochs at batch {trial.budget.global_batch_size} = {schedule.total_steps(trial)} steps a trial.",
        f"Search ({study.sampler.name}): configurations {searched}; {counted(len(study.search.seeds), 'seed')} each.",
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


def _markdown(found: Findings, tables: Sequence[Table]) -> str:
    comparison = found.comparison

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|*_<>`\[\]])", r"\\\1", cell) for cell in cells) + " |"

    parts = [f"# {comparison.study}: {comparison.workload.name}"]
    parts += [f"**{answer.question}** {answer.text}" for answer in found.answers]
    parts += ["## In numbers", *verdicts(comparison)]
    for table in tables:
        rule = "|" + "|".join(" --- " if i < table.text_columns else " ---: " for i in range(len(table.columns))) + "|"
        parts += [f"## {table.title}", "\n".join([line(table.columns), rule, *map(line, table.rows)]), table.note]
    if comparison.flags:
        parts += ["## To bear in mind", "\n".join(f"- {flag}" for flag in comparison.flags)]
    parts += ["## What this study does not tell", "\n".join(f"- {line}" for line in found.missing)]
    return "\n\n".join(parts) + "\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "—": "---", "–": "--", "α": r"$\alpha$", "λ": r"$\lambda$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


def _latex(found: Findings, tables: Sequence[Table]) -> str:
    comparison = found.comparison
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
        rows = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in table.rows]
        head = " & ".join(map(escape_latex, table.columns)) + r" \\"
        caption = f"\\caption{{{escape_latex(f'{comparison.study}, {comparison.workload.name}: {table.title.lower()}. {table.note}')}}}"
        body = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        label = f"\\label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', comparison.study)}-{table.name}}}"
        parts.append("\n".join([r"\begin{table}", r"\centering", caption, label, *body, r"\end{table}"]))
    parts.append("\n".join("% " + line for line in [*(f"{a.question} {a.text}" for a in found.answers), *verdicts(comparison)]))
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- HTML

CAPTIONS = {
    "result": "Above: each seed, the mean and its 95 % interval. Below: each difference with its 95 % interval, filled by the "
    "study's declared method, open by others; the band is the margin of equivalence.",
    "error_by_epoch": "Validation error of the reported configurations by epoch, after every evaluation: mean over seeds, band from the "
    "lowest to the highest seed, as far as none of an arm's seeds had diverged. Large markers: the end of a cycle.",
    "anytime": "Validation error of the answer at hand, the solution at the end of the last completed cycle (none before the first): "
    "mean over seeds, band from the lowest to the highest seed, as far as none of an arm's seeds had diverged.",
    "maps": "Mean error over the seeds of each cell of a grid over learning rate and weight decay, one scale for all; circle: the best "
    "cell; crosses: a seed diverged; blank: no result. A decoupled map has its basin along the axes, a coupled one along a diagonal.",
    "budgets": "Above: the holdout error that half of all searches of a budget end below, band: 95 % interval, drawn as far as the points "
    "carry one, curves up to half the points. Below: the probability that one arm ends ahead of another at equal budgets.",
    "gap": "Error against training loss at the end of the budget, a mark a configuration of the search: at equal loss, the lower arm "
    "generalises better.",
    "schedule": "Multiplier η of the base learning rate and weight decay λ by epoch, as configured; equal schedules coincide.",
}

PICTURES = {f"{name}.{kind}" for name in CAPTIONS for kind in ("png", "svg")}
"""names of all pictures that a report may have"""


def _page(records: Records, found: Findings, tables: Sequence[Table], vectors: Mapping[str, bytes], complaints: Sequence[str]) -> str:
    comparison = found.comparison
    said = verdicts(comparison)
    shown = "\n".join(_figure(number, name, svg) for number, (name, svg) in enumerate(vectors.items(), start=1))
    trials = trials_table(records)
    delivered = "MLflow has every final point of every journal." if not complaints else "MLflow and the journals differ:"
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{comparison.study}: {comparison.workload.name}"),
        subtitle=html.escape(" against ".join(arm.name for arm in comparison.arms)),
        answers="\n".join(f"<p><b>{html.escape(a.question)}</b> {html.escape(a.text)}</p>" for a in found.answers),
        verdicts="\n".join(f"<p>{html.escape(line)}</p>" for line in said),
        tables="\n".join(f"{_heading(number, table)}\n{_html_table(table)}" for number, table in enumerate(tables, start=1)),
        flags=_list(comparison.flags) if comparison.flags else "<p>Nothing.</p>",
        figures=shown,
        missing=_list(found.missing),
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
        GT(frame, id=f"table-{table.name}")
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
