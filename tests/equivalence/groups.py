"""Process groups side by side: started, watched, and started anew without the run that failed."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.equivalence.rank import Failed, Run, work

SECONDS_A_RUN = 150
"""without a result, before a group is given up"""
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.optim", "harness.train", "tests.equivalence.rank", "deepspeed"]


def preload() -> None:
    """Has ranks forked from a server that has imported what they need, if no server has been started yet."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(PRELOADED)


class Group:
    """The processes of one process group, and the runs that they do in turn."""

    def __init__(self, runs: Sequence[Run], root: Path, device: str) -> None:
        self.runs, self.world = list(runs), runs[0].world
        """runs: those still to be done; the first is under way"""
        unique = uuid.uuid4().hex
        self._logs = [root / f"{unique}-{rank}.log" for rank in range(self.world)]
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")  # CUDA does not survive a fork
        self._pipes, self._processes = [], []
        for rank, log in enumerate(self._logs):
            env = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world),
                "WRBENCH_RENDEZVOUS": f"file://{root}/{unique}", "DS_ACCELERATOR": device,
            } | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(env, self.runs, root, theirs, log), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._first = self._pipes[0]
        self.connections = list(self._pipes)
        self._last = time.monotonic()

    def receive(self, seconds: float) -> list[tuple[str, Any]]:
        """What ranks have to say within `seconds`: (run, result), or the Failed of the run that ended the group."""
        heard: list[tuple[str, Any]] = []
        for connection in wait(self.connections, seconds):
            name, result = self._message(connection)
            if isinstance(result, Failed):
                return [*heard, (name, self._reason(result))]
            if connection is self._first and name:
                heard.append((name, result))
                self._last = time.monotonic()
        if not heard and time.monotonic() - self._last > SECONDS_A_RUN:
            return [(self.runs[0].name, Failed(f"no result in {SECONDS_A_RUN} s{self._tail()}"))]
        return heard

    def _message(self, connection: Any) -> tuple[str, Any]:
        try:
            name, result = connection.recv()
        except (EOFError, OSError):
            self.connections.remove(connection)
            rank = self._processes[self._pipes.index(connection)]
            rank.join(5)
            return (
                ("", None) if rank.exitcode == 0 else (self.runs[0].name, Failed(f"a rank died, exit code {rank.exitcode}{self._tail()}"))
            )
        return name, result

    def _reason(self, first: Failed) -> Failed:
        """Of what the ranks say within two seconds, what does not only say that another one is gone."""
        said, deadline = [first], time.monotonic() + 2
        while self.connections and (seconds := deadline - time.monotonic()) > 0:
            for connection in wait(self.connections, seconds):
                result = self._message(connection)[1]
                said += [result] if isinstance(result, Failed) else []
        return next((f for f in said if not any(w in str(f).lower() for w in ("gloo", "connection", "a rank died"))), first)

    def _tail(self) -> str:
        return "".join(f"; {log.read_text()[-500:]}" for log in self._logs if log.exists())

    def end(self) -> None:
        for process in self._processes:
            process.join(2)
            if process.exitcode is None:
                process.kill()
                process.join()
        for connection in self._pipes:
            connection.close()


def execute(runs: Iterable[Run], root: Path, device: str, capacity: int, report: Callable[[Run], None]) -> dict[str, Any]:
    """{name: result or Failed} of every run, as many ranks at a time as `capacity`, or one group that is larger.

    A run that fails takes its group with it; the group's other runs are done by a new one. `report` hears of each run.
    """
    results: dict[str, Any] = {}
    by_name = {run.name: run for run in runs}
    waiting = _batches(list(by_name.values()))
    active: list[Group] = []

    def settle(run: Run, result: Any) -> None:
        results[run.name] = result
        report(run)

    try:
        while waiting or active:
            for batch in list(waiting):
                if any(name not in results for run in batch for name in run.needs):
                    continue
                for run in (run for run in batch if run.name not in results):
                    lost = next((name for name in run.needs if isinstance(results[name], Failed)), None)
                    if lost is not None:
                        settle(run, Failed(f"needs {lost}, which failed"))
                left = [run for run in batch if run.name not in results]
                if not left or not active or sum(group.world for group in active) + batch[0].world <= capacity:
                    waiting.remove(batch)
                    active += [Group(left, root, device)] if left else []
            for group in list(active):
                failed = False
                for name, result in group.receive(0.1 / len(active)):
                    settle(by_name[name], result)
                    group.runs = [run for run in group.runs if run.name != name]
                    failed |= isinstance(result, Failed)
                if failed or not group.runs:
                    active.remove(group)
                    group.end()
                    waiting[:0] = [group.runs] if group.runs else []
    finally:
        for group in active:
            group.end()
    return results


def _batches(runs: list[Run]) -> list[list[Run]]:
    """Runs that share a process group; the largest groups, and what others need, first."""
    needed = {name for run in runs for name in run.needs}
    batches: dict[Any, list[Run]] = {}
    for run in runs:
        batches.setdefault((bool(run.needs), run.group), []).append(run)
    return sorted(batches.values(), key=lambda b: (bool(b[0].needs), not any(r.name in needed for r in b), -sum(r.cost for r in b)))
