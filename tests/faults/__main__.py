"""`make faults`: prints each row as it ends, writes build/faults.json, exits 1 on FAIL."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from harness.data.parallel import end_with_parent
from tests.faults.lab import digits, lane, load
from tests.report import publish


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="only faults with this in their name")
    parser.add_argument("--once", action="store_true", help="each fault once and small, as the tests do; speed is not judged")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of what is drawn at random")
    options = parser.parse_args()
    every = load()
    chosen = [f for f in every.values() if not options.faults or any(part.lower() in f.name.lower() for part in options.faults)]
    if not chosen:
        print(f"error: no fault has {options.faults[0]!r} in its name; there are: {'; '.join(every)}", file=sys.stderr)
        return 2
    print(f"{len(chosen)} faults, --seed {options.seed}", flush=True)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="wrbench-faults-") as scratch,
        ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool,
    ):
        data, few = digits(Path(scratch))
        run = partial(lane, data=data, few=few, thorough=not options.once, seed=options.seed, began=began)
        rows = run([f.name for f in chosen if not f.slurm and not f.beside])  # with nothing beside it: it judges milliseconds
        # SLURM's commands mean one cluster in a process
        beside = pool.submit(run, [f.name for f in chosen if f.beside])
        rows += run([f.name for f in chosen if f.slurm and not f.beside])
        rows += beside.result()
    return publish("faults", rows, shown=rows)


if __name__ == "__main__":
    sys.exit(main())
