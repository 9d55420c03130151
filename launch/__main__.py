"""The command line: options in, one call, an exit status out.

0 done, 1 the thing asked for failed, 2 bad input, 130 interrupted. Errors are one line each on stderr.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness import deliverer, provenance, tracking
from harness import study as studies
from harness.config import CONFIGS, BadInput, Cluster, Slurm, Trial, find, parse, read_cluster, read_yaml
from harness.journal import NO_ROOM
from harness.publish import publish
from harness.store import Store
from harness.study import LoadedStudy
from harness.tracking import DeliveryError
from launch import array as arrays
from launch import plan as plans
from launch import status as statuses
from launch import submit as submissions
from launch.ledger import Ledger
from launch.slurm import SlurmError
from launch.terminal import bar, console

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="AdamWR against SGDWR, measured.")
study = typer.Typer(no_args_is_help=True, help="Plan, run and watch a study.")
shards = typer.Typer(no_args_is_help=True, help="Build, index and verify shards of images.")
app.add_typer(study, name="study")
bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(shards, name="shards")
app.add_typer(bench, name="bench")

File = Annotated[str, typer.Argument(metavar="FILE", help="a study file, or a name in configs/study, else in the store")]
StoreOption = Annotated[Path, typer.Option("--store", help="folder of all runs")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override by dotted key; repeatable")]
ClusterOption = Annotated[str, typer.Option("--cluster", metavar="NAME|PATH", help="a name in configs/cluster, or a path")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]
RUNS = Path("./runs")

UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]  # click's, or typer's own copy of click, by its version


def main() -> None:
    """Entry point of `wrbench`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks must not end a command
    sys.exit(run(app))


def _show_version(asked: bool) -> None:
    if asked:
        print(f"wrbench {provenance.version('wrbench') or '(not installed)'}, commit {provenance.code()['commit'] or 'unknown'}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="of this and its commit")] = False,
) -> None:
    """AdamWR against SGDWR, measured."""


def run(commands: typer.Typer) -> int:
    """The exit status of the command in sys.argv."""
    try:
        return int(commands(prog_name="wrbench", standalone_mode=False) or 0)
    except BadInput as error:
        return _complain(str(error), 2)
    except (DeliveryError, SlurmError) as error:
        return _complain(str(error), 1)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is its message, or with rich printed already
            print(error.format_message(), end="")
            return 2
        return _complain(f"{error.format_message()} (see --help)", 2)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `wrbench ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a disk that is full, a folder that is somebody else's; a write that fails names no file
        unnamed = error.filename is None and error.errno in NO_ROOM
        return _complain(f"{error.strerror}; make room where the store is" if unnamed else str(error), 1)


def _complain(message: str, status: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return status


def _load(file: str, overrides: Sequence[str] | None, store: Path = RUNS) -> LoadedStudy:
    """A study by its file, by a name in configs/study, or by the name under which the store has it as it was last submitted."""
    stored = store / file / "study.yaml"
    try:
        path = find("study", file)
    except BadInput:
        if Path(file).name != file or not stored.is_file():
            raise
        path = stored
    return studies.load(path, overrides or ())


# ---------------------------------------------------------------------------------------------------- study


@study.command("plan")
def plan(
    file: File,
    as_json: JsonOption = False,
    schedule: Annotated[bool, typer.Option("--schedule", help="also eta, lr and weight decay by step")] = False,
    cluster: ClusterOption = "local",
    overrides: SetOption = None,
    store: StoreOption = RUNS,
) -> None:
    """Trials, steps, cycle ends and estimated cost, without starting anything."""
    loaded, where = _load(file, overrides, store), read_cluster(cluster)
    if as_json:
        print(json.dumps(plans.as_json(loaded, Store(store), where, schedule), indent=2))
        return
    plans.show(console(), loaded, Store(store), where, schedule)
    _warn(loaded, where)


def _warn(loaded: LoadedStudy, cluster: Cluster) -> None:
    for warning in plans.plan_warnings(loaded, cluster):
        print(f"warning: {warning}", file=sys.stderr)


@study.command("submit")
def submit(
    file: File,
    cluster: ClusterOption = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be submitted, and stop")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="go on in the background and return at once")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="failed and exhausted trials too")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="SLURM: cancel trials that left the study file")] = False,
    chain: Annotated[bool, typer.Option("--chain", help="SLURM: finalists and report follow as a dependent job")] = False,
    phase: Annotated[Literal["search", "finalists"] | None, typer.Option("--phase", help="only this phase")] = None,
    overrides: SetOption = None,
    store: StoreOption = RUNS,
) -> int:
    """Run what is missing of a study; trials that are finished or running are left alone."""
    loaded, where, kept = _load(file, overrides, store), read_cluster(cluster), Store(store)
    if isinstance(where, Slurm):
        if detach:
            raise BadInput(f"--detach: is for this machine; {cluster} is SLURM, and a submission to it returns at once")
        if dry_run:
            print("\n".join(arrays.dry_run(loaded, kept, where, phase, retry)))
            _warn(loaded, where)
            return 0
        done, over = arrays.submit(loaded, kept, where, phase=phase, retry=retry, prune=prune, chain=chain)
        return deliver_and_report(loaded, kept) if chain and over else done
    if prune or chain:
        raise BadInput(f"--{'prune' if prune else 'chain'}: is for SLURM; {cluster} is executor {where.executor}")
    if dry_run:
        print("\n".join(submissions.dry_run(loaded, kept, phase, retry)))
        _warn(loaded, where)
        return 0
    if detach:
        print(submissions.detach(loaded, kept, where, [a for a in sys.argv[1:] if a != "--detach"]))
        return 0
    again = f"wrbench {shlex.join(sys.argv[1:])}"
    given = ["--store", str(store)] if store != RUNS else []
    sync = "wrbench " + shlex.join(["sync", file, *(part for one in overrides or () for part in ("--set", one)), *given])
    return submissions.submit(loaded, kept, where, phase=phase, retry=retry, again=again, sync=sync)


@study.command("status")
def status(
    file: File,
    watch: Annotated[bool, typer.Option("--watch", help="redraw until every trial has ended")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
    store: StoreOption = RUNS,
) -> None:
    """Where every trial of a study stands."""
    loaded, kept = _load(file, overrides, store), Store(store)
    if as_json:
        _deliver_from_here(loaded, kept)
        found = [asdict(row) for row in statuses.rows(loaded, kept)]
        print(json.dumps({"study": loaded.name, "trials": found}, indent=2))
    elif watch:
        with deliverer.start_delivery(kept, loaded.name) if arrays.is_by_slurm(kept, loaded.name) else nullcontext():
            statuses.show(loaded, kept, watch)
    else:
        statuses.show(loaded, kept, watch)
        _deliver_from_here(loaded, kept)


def _deliver_from_here(loaded: LoadedStudy, store: Store) -> None:
    """What jobs of a cluster have only written down: they do not write to the embedded store themselves."""
    if not arrays.is_by_slurm(store, loaded.name) or not tracking.undelivered(store, loaded.name):
        return
    try:
        failed = tracking.deliver(store, loaded.name).failed
    except DeliveryError as error:
        failed = (str(error),)
    for reason in failed:
        print(f"warning: not delivered to MLflow: {reason}", file=sys.stderr)


@study.command("cancel")
def cancel(file: File, overrides: SetOption = None, store: StoreOption = RUNS) -> None:
    """Stop a study; running trials save themselves first."""
    loaded, kept = _load(file, overrides, store), Store(store)
    if not kept.study(loaded.name).is_dir():  # a submission that begins has no trials yet
        kept.check_trials(loaded.name)
    stopped = [*arrays.cancel(loaded, kept), *submissions.cancel(loaded, kept)]
    print("\n".join(stopped) or f"nothing of {loaded.name} is running")


@study.command("logs")
def logs(
    file: File,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="a trial id, or its beginning")],
    overrides: SetOption = None,
    store: StoreOption = RUNS,
) -> None:
    """The ends of the newest logs of a trial, rank by rank."""
    loaded, kept = _load(file, overrides, store), Store(store)
    print("\n".join(statuses.logs(statuses.find_trial(loaded, kept, trial), Ledger(kept.study(loaded.name)))))


# ---------------------------------------------------------------------------------------------------- trial


@app.command("train")
def train(file: Annotated[Path, typer.Argument(metavar="TRIAL.yaml", help="a resolved trial")], store: StoreOption = RUNS) -> int:
    """One trial in this process, or in every rank of torchrun or srun."""
    from harness.data.index import checked

    document = read_yaml(file)
    if "arms" in document:
        raise BadInput(f"{file}: arms: is of a study, not of a resolved trial; wrbench study submit {shlex.quote(str(file))} runs it")
    trial = parse(Trial, document, str(file))
    kept = Store(store)
    kept.check_writable()
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not ranks.isdigit() or int(ranks) < 1:
        raise BadInput(f"WORLD_SIZE: {ranks!r} must be a number of processes; e.g. 2")
    trial.micro_batch_size(int(ranks))
    checked(trial.workload.data, trial.evaluation.test if trial.phase == "finalists" else None)
    import torch

    from harness.train import train

    torch.set_num_threads(_threads())

    result = train(trial, kept)
    if os.environ.get("RANK", "0") == "0":
        print(f"{statuses.label(trial)}: {result['state']} at step {result['step']} of {result['total_steps']}")
        print(kept.trial(trial.study, trial.trial_id).path)
    return 130 if result["state"] == "interrupted" else 0


def _threads() -> int:
    """Of torch: a rank's default, as launch has it. As many as there are cores, in each thread that reads too, leave the loop none."""
    told = os.environ.get("OMP_NUM_THREADS", "1")
    return int(told) if told.isdigit() and int(told) else 1


# --------------------------------------------------------------------------------------------------- shards


ShardsArgument = Annotated[str, typer.Argument(metavar="PATH", help="folder of the shards, or a list, quoted: 'DIR/train-{000..146}.tar'")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="processes; default: all cores")]


@shards.command("build")
def build(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="mnist5k, ilsvrc2012, folder, imagenet32, imagenet64, cifar10 or fixture")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new or empty folder")],
    src: Annotated[Path | None, typer.Argument(metavar="[SRC]", help="folder of the images, for kinds that need one")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the order")] = 0,
    shard_samples: Annotated[int | None, typer.Option("--shard-samples", metavar="N", help="samples a shard")] = None,
    max_side: Annotated[int | None, typer.Option("--max-side", metavar="PIXELS", help="scale larger images down to it")] = None,
    quality: Annotated[int | None, typer.Option("--quality", metavar="Q", help="encode every image again, as JPEG")] = None,
    labels: Annotated[Path | None, typer.Option("--labels", metavar="FILE", help="folder: lines of NAME CLASS for val/*.jpg")] = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", min=1, help="fixture: how many")] = None,
    workers: WorkersOption = None,
) -> None:
    """Standard WebDataset shards and their index. Killed, it goes on where it was when it is run again."""
    from harness.data import build as library
    from harness.data.parallel import cores

    options = library.Options(seed, shard_samples, max_side, quality)
    with bar("building", "images") as progress:
        done = library.build(kind, src, out, options, labels, samples, workers or cores(), progress)
    print(done)


@shards.command("index")
def index(
    path: ShardsArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where the index goes, if not beside the shards")] = None,
    workers: WorkersOption = None,
) -> None:
    """Write the index of shards that are there."""
    from harness.data import shards as library
    from harness.data.parallel import cores

    with bar("indexing", "bytes") as progress:
        made = library.index_shards(path, out, progress, workers or cores(), lambda line: print(f"warning: {line}", file=sys.stderr))
    print(f"{out or path}: {len(made.key)} samples in {len(made.shards)} shards")


@shards.command("verify")
def verify(path: ShardsArgument, workers: WorkersOption = None) -> int:
    """Read and decode every sample; exit 1 when something is wrong. PATH may also be an index file."""
    from harness.data import verify as library
    from harness.data.parallel import cores

    with bar("verifying", "bytes") as progress:
        verified = library.verify(path, progress, workers or cores())
    faults = [str(f).removeprefix("fault: ") for f in verified.findings if f.severity == "fault"]
    for line in (*(f for f in verified.findings if f.severity == "warning"), *verified.classes):
        print(line)
    print(f"{path}: {len(faults)} fault(s), {len(verified.findings) - len(faults)} warning(s)")
    return _complain("\n".join(faults), 1) if faults else 0


@shards.command("bench")
def shards_bench(
    path: Annotated[Path, typer.Argument(help="folder of the shards, or an index file")],
    image_size: Annotated[int, typer.Option("--image-size", metavar="PIXELS", min=8, help="of the random crops, resized")] = 224,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="to feed")] = 8,
    gpu_rate: Annotated[float, typer.Option("--gpu-rate", metavar="IMAGES/S", min=1, help="that one GPU trains on")] = 2500,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="to measure for")] = 10,
) -> None:
    """How fast these shards are read, decoded and resized here, and how many GPUs that feeds."""
    from harness.data import bench as library

    for line in library.measure(path, image_size, seconds).lines(gpus, gpu_rate):
        print(line)


@bench.command("train")
def bench_train(
    file: File,
    steps: Annotated[int, typer.Option("--steps", min=2, help="of a round")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="of each of the three loops, in turn; one more is not counted")] = 5,
    overrides: SetOption = None,
) -> None:
    """How fast the first trial of a study trains here: on shards, on a batch at hand, and by a bare PyTorch loop, side by side."""
    import torch

    from harness import bench as library
    from harness.data.index import checked

    loaded = _load(file, overrides)
    trial = studies.first_trial(loaded)
    checked(trial.workload.data, None)
    torch.set_num_threads(_threads())
    print(f"{trial.workload.name}, {trial.arm}: {trial.workload.model.name}, batch {trial.budget.global_batch_size}, {trial.backend.name}")
    with bar("measuring", "rounds") as progress:
        measured = library.measure(trial, steps, rounds, progress)
    for line in measured.lines():
        print(line)


# -------------------------------------------------------------------------------------------------- results


@app.command("sync")
def sync(file: File, overrides: SetOption = None, store: StoreOption = RUNS) -> int:
    """Deliver to MLflow what is missing there."""
    loaded = _load(file, overrides, store)
    Store(store).check_trials(loaded.name)
    sent, undelivered = _deliver(loaded, Store(store))
    print(f"{loaded.name}: delivered {sent.points} point(s) of {sent.trials} trial(s)")
    return _complain("\n".join(undelivered), 1) if undelivered else 0


def _deliver(loaded: LoadedStudy, store: Store) -> tuple[tracking.Delivered, list[str]]:
    """What was sent, and a line for whatever MLflow lacks nevertheless."""
    sent, missing = tracking.sync(store, loaded.name)
    return sent, [*sent.failed, *(f"{m.trial_id}: not in MLflow: {m.reason}" for m in missing)]


@app.command("report")
def report(file: File, overrides: SetOption = None, store: StoreOption = RUNS) -> int:
    """Tables, figures and the comparison of a study."""
    return deliver_and_report(_load(file, overrides, store), Store(store))


def deliver_and_report(loaded: LoadedStudy, store: Store) -> int:
    """Delivers what MLflow lacks, writes the report, prints where, and has MLflow show it too; the exit status."""
    if tracking.is_own(store):  # a server may have runs that this store has not
        store.check_trials(loaded.name)
    from analysis import report as reports
    from analysis.runs import Unreadable

    try:
        _, undelivered = _deliver(loaded, store)
    except DeliveryError as error:
        undelivered = [str(error)]
    try:
        print(reports.report(loaded, store.root, undelivered=undelivered), flush=True)
    except Unreadable as error:
        return _complain(str(error), 1)
    for line in statuses.shortcomings(loaded, store):
        print(f"warning: {line}", file=sys.stderr)
    try:
        publish(store, loaded.name, reports.PICTURES)
    except DeliveryError as error:
        print(f"warning: the report is not in MLflow: {error}", file=sys.stderr)
    return _complain("\n".join(undelivered), 1) if undelivered else 0


@app.command("ui")
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="on 127.0.0.1")] = 5000, store: StoreOption = RUNS) -> None:
    """MLflow's UI on the store."""
    tracking.open_ui(Store(store), port)


@app.command("notebook")
def notebook() -> None:
    """Open the notebooks that read results."""
    if importlib.util.find_spec("notebook") is None:
        raise typer.Exit(_complain("jupyter notebook is not installed; make setup, or pip install -e '.[notebook]'", 1))
    folder = CONFIGS.parent / "analysis" / "notebooks"
    root = ["--allow-root"] if os.geteuid() == 0 else []  # Jupyter refuses otherwise, as in a container
    os.execv(sys.executable, [sys.executable, "-m", "notebook", "--ip=127.0.0.1", f"--notebook-dir={folder}", *root])  # noqa: S606


@app.command("doctor")
def doctor(store: StoreOption = RUNS) -> int:
    """What is here of what wrbench needs, and how to get the rest."""
    from launch import doctor as doctors

    return 0 if doctors.show(console(), Store(store)) else 1


if __name__ == "__main__":
    main()
