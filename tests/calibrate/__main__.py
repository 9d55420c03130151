"""`make calibrate`: simulated studies with known truth; prints the table, writes build/calibrate.json, exits 1 on FAIL."""

from __future__ import annotations

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

from rich.progress import track

from tests.calibrate.cells import STUDIES, Cell, table
from tests.report import Row, publish


def rows(cells: list[Cell], studies: int) -> list[Row]:
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        # the long ones first, so that no core waits for one at the end
        waiting = {cell.name: pool.submit(cell.rows, studies) for cell in sorted(cells, key=lambda cell: -cell.weight)}
        return [row for cell in track(cells, "simulated studies", disable=not sys.stderr.isatty()) for row in waiting[cell.name].result()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.calibrate", description=__doc__)
    parser.add_argument("-k", metavar="PATTERN", default="", help="only cells whose name matches this regular expression")
    parser.add_argument("--studies", type=int, default=STUDIES, help=f"simulated studies a cell (default: {STUDIES})")
    arguments = parser.parse_args()
    cells = [cell for cell in table() if re.search(arguments.k, cell.name, re.IGNORECASE)]
    if not cells:
        print(f"error: -k: no cell matches {arguments.k!r}; e.g. -k welch", file=sys.stderr)
        return 2
    return publish("calibrate", rows(cells, arguments.studies))


if __name__ == "__main__":
    sys.exit(main())
