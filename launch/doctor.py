"""What this machine has of what wrbench needs, and the command that brings what it has not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from harness.config import CONFIGS, BadInput, WorkloadFile, parse, read_yaml
from harness.data import decode
from harness.data.index import checked
from harness.store import Store
from harness.tracking import check_store, is_server, redacted, tracking_uri
from launch import slurm
from launch.local import visible_gpus

INSTALL = "make setup"
_TORCH = """
import json, torch
found = {"version": torch.__version__, "build": "CUDA " + torch.version.cuda if torch.version.cuda else "CPU", "gpus": []}
if torch.cuda.is_available():
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(found))
"""
_TORCHVISION = "from harness.vision import torchvision; import json; print(json.dumps({'version': torchvision().__version__}))"
_KERNELS = "from harness import one_pass; one_pass.probe(); import json, triton; print(json.dumps({'version': triton.__version__}))"
_DEEPSPEED = "import deepspeed, json; print(json.dumps({'version': deepspeed.__version__}))"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    ok: bool
    text: str
    fix: str = ""
    required: bool = False


def show(out: Console, store: Store) -> bool:
    """Prints what is found, as it is found; whether everything required is there."""
    healthy = True
    for finding in findings(store):
        mark = ("ok", "green") if finding.ok else ("MISSING", "red") if finding.required else ("missing", "yellow")
        line = Text.assemble((f"{mark[0]:<8}", mark[1]), (f"{finding.name:<12}", "bold"), finding.text)
        out.print(line, soft_wrap=True)
        if finding.fix:
            out.print(f"{'':20}fix: {finding.fix}", soft_wrap=True, markup=False)
        healthy = healthy and (finding.ok or not finding.required)
    return healthy


def findings(store: Store) -> Iterator[Finding]:
    """Everything looked at, in order; torch only in child processes, which may crash without harm."""
    yield _python()
    yield from _torch()
    yield from _bytecode()
    yield _child("torchvision", _TORCHVISION, required=True, meaning="models and image transforms")
    yield _child("deepspeed", _DEEPSPEED, required=False, meaning="the DeepSpeed backend")
    yield _package("submitit", "starts the ranks of a trial")
    yield _package("mlflow", "tracking and its UI")
    yield _tracking(store)
    yield _slurm()
    yield _decoding()
    yield from _shards()


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, f"{sys.version.split()[0]} at {sys.executable}", "" if ok else "install Python 3.11 or later", True)


def _probe(code: str) -> tuple[dict[str, object] | None, str]:
    """What `code` prints as JSON in a child process, or None and the last line of its complaint."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CONFIGS.parent), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    except subprocess.TimeoutExpired:
        return None, "no answer within 180 s"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, ""


def _torch() -> Iterator[Finding]:
    found, complaint = _probe(_TORCH)
    if found is None:
        yield Finding("torch", False, complaint, INSTALL, True)
        return
    version = str(found["version"])
    ok = tuple(int(n) for n in version.split(".")[:2]) >= (2, 11)
    yield Finding("torch", ok, f"{version}, {found['build']} build", "" if ok else INSTALL, True)
    gpus, driver = found["gpus"], _gpus_of_the_driver()
    if isinstance(gpus, list) and gpus:
        yield Finding("GPUs", True, f"{len(gpus)}: {', '.join(dict.fromkeys(map(str, gpus)))}")
        yield _kernels()
    elif driver:
        fix = "install a CUDA build of torch and its torchvision"
        yield Finding("GPUs", False, f"{driver} in the machine, but this build of torch cannot use them", fix)
    else:
        yield Finding("GPUs", False, f"none: trials train on the CPU ({os.cpu_count()} cores) over gloo")


def _bytecode() -> Iterator[Finding]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    sources = sorted(folder.glob("*.py"))
    stale = [source for source in sources if not _is_compiled(source)]
    if not stale:
        yield Finding("bytecode", True, f"compiled once for all ranks ({len(sources)} files of torch looked at)")
        return
    why = "every start of a rank compiles torch anew, for seconds; an environment that was copied without its files' dates does that"
    fix = f"{sys.executable} -m compileall -q -f --invalidation-mode unchecked-hash {folder.parent}"
    yield Finding("bytecode", False, f"stale or absent for {len(stale)} of {len(sources)} files of torch looked at: {why}", fix)


class _NotCompiled(Exception):
    pass


class _Bytecode(SourceFileLoader):
    """Python's own loader, which stops where it would compile."""

    def source_to_code(self, *_: object, **__: object) -> NoReturn:  # type: ignore[override]
        raise _NotCompiled


def _is_compiled(source: Path) -> bool:
    """Whether this Python would take a module's bytecode, and not compile its source."""
    try:
        _Bytecode(source.stem, str(source)).get_code(source.stem)
    except _NotCompiled:
        return False
    return True


def _kernels() -> Finding:
    found, complaint = _probe(_KERNELS)
    if found is None:
        fix = "install a C compiler, and let TRITON_CACHE_DIR be a folder that can be written"
        return Finding("triton", False, f"steps are torch's, in more passes over memory than harness.one_pass: {complaint}", fix)
    return Finding("triton", True, f"{found['version']}: makes the kernels of harness.one_pass")


def _gpus_of_the_driver() -> int:
    try:
        return len(visible_gpus())
    except BadInput:
        return 0


def _child(name: str, code: str, required: bool, meaning: str) -> Finding:
    found, complaint = _probe(code)
    if found is None:
        return Finding(name, False, f"{meaning}: {complaint}", INSTALL, required)
    return Finding(name, True, f"{found['version']}: {meaning}", required=required)


def _package(name: str, meaning: str) -> Finding:
    try:
        return Finding(name, True, f"{importlib.metadata.version(name)}: {meaning}", required=True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, meaning, INSTALL, True)


def _tracking(store: Store) -> Finding:
    uri = tracking_uri(store)
    shown = redacted(uri)
    try:
        if is_server(uri):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()  # noqa: S310 - http(s), just tested
            return Finding("store", True, f"MLflow server {shown} answers", required=True)
        if not uri.startswith("sqlite:"):
            check_store(store)
            return Finding("store", True, f"{shown}: not tried", required=True)
        was_there = store.root.exists()
        check_store(store)
        if not was_there and store.root.exists():
            store.root.rmdir()
        return Finding("store", True, f"{shown} can be written", required=True)
    except BadInput as error:
        return Finding("store", False, str(error), "choose another with --store, or set MLFLOW_TRACKING_URI", True)
    except OSError as error:
        return Finding("store", False, f"MLflow server {shown}: {error}", "start it, or unset MLFLOW_TRACKING_URI", True)


def _slurm() -> Finding:
    if absent := [name for name in ("sbatch", "squeue", "scontrol") if shutil.which(name) is None]:
        fix = "on a cluster, run wrbench on a login node"
        return Finding("SLURM", False, f"no {', no '.join(absent)}: studies run on this machine (--cluster local)", fix)
    try:
        longest = slurm.max_array_size()
    except slurm.SlurmError as error:
        return Finding("SLURM", False, f"found, but its controller does not answer: {error}", "see whether SLURM_CONF is right")
    try:
        slurm.run("sacct", "--noheader", "--allocations", seconds=20)
        accounting = "sacct answers"
    except slurm.SlurmError:
        accounting = "no slurmdbd: states come from squeue and the journals"
    return Finding("SLURM", True, f"its controller answers; arrays of up to {longest} tasks; {accounting}")


def _decoding() -> Finding:
    """The decoder in use, and the rates of all that are here: one synthetic photograph of ImageNet's usual size, one thread."""
    y, x = np.mgrid[0:375, 0:500]
    smooth = np.stack([127 + 80 * np.sin(x / 37 + c) * np.cos(y / 29) for c in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 8, smooth.shape)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    content, scratch = encoded.getvalue(), decode.Scratch()

    def rate(name: str, box: decode.Box) -> str:
        return f"{_rate(lambda: decode.JPEG[name].crop(content, 3, (375, 500), box, scratch)):.0f}"

    rates = [f"{name} {rate(name, decode.whole(375, 500))}" for name in decode.JPEG]
    part = f", {rate(decode.decoder, decode.Box(125, 94, 250, 187))} for a quarter of it"
    text = f"{decode.decoder} is in use; images/s a thread (500x375 JPEG, {len(content) / 1000:.0f} kB): {', '.join(rates)}{part}"
    fix = "install a C compiler and the headers of libjpeg-turbo, then make setup: only the crop of an image is decoded then"
    return Finding("decoding", "libjpeg" in decode.JPEG, text, "" if "libjpeg" in decode.JPEG else fix)


def _rate(once: Callable[[], object]) -> float:
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < 0.25:
        once()
        count += 1
    return count / spent


def _shards() -> Iterator[Finding]:
    """A line for all workloads of which the same is to be said."""
    found: dict[tuple[bool, str], list[str]] = {}
    for path in sorted((CONFIGS / "workload").glob("*.yaml")):
        try:
            data = parse(WorkloadFile, {"name": path.stem, **read_yaml(path)}, path.name).data
            checked(data, None)
            told = True, f"{data.train_samples} train and {data.val_samples} val at {data.path}"
        except BadInput as error:
            told = False, str(error).splitlines()[0]
        found.setdefault(told, []).append(path.stem)
    for (ok, text), names in found.items():
        yield Finding("shards", ok, f"{', '.join(names)}: {text}")
