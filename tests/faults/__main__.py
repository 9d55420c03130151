"""`make faults`: prints each row as it ends, writes build/faults.json, exits 1 on FAIL."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.lab import Fault, a_cluster, digits, load, perform
from tests.report import Row, line, publish, refused

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster


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
    rows: list[Row] = []
    needed = any(f.slurm for f in chosen)
    with tempfile.TemporaryDirectory(prefix="wrbench-faults-") as scratch, a_cluster() if needed else nullcontext((None, None)) as found:
        cluster, absent = found
        data, few = digits(Path(scratch))
        for chosen_fault in chosen:
            before = time.monotonic()
            print(f"--- {chosen_fault.name}", flush=True)
            for row in _rows(chosen_fault, absent, cluster, data, few, options):
                rows.append(row)
                now = time.monotonic()
                print(f"{line(row)}  [{now - before:.0f} s, {(now - began) / 60:.1f} min in all]", flush=True)
                before = now
    return publish("faults", rows, shown=rows)


def _rows(given: Fault, absent: str | None, cluster: Cluster | None, data: Path, few: Path, options: argparse.Namespace) -> Iterator[Row]:
    if given.slurm and absent:
        yield refused(given.name, absent)
    else:
        yield from perform(given, data=data, few=few, thorough=not options.once, seed=options.seed, cluster=cluster)


if __name__ == "__main__":
    sys.exit(main())
