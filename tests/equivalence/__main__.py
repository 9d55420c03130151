"""`make equivalence`: prints the table, writes build/equivalence.json, exits 1 on FAIL."""

from __future__ import annotations

import argparse
import re
import sys

from tests.equivalence import groups
from tests.equivalence.problem import FULL
from tests.report import publish


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("-k", metavar="PATTERN", default="", help="only rows whose name matches this regular expression")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    groups.preload()

    from tests.equivalence import report
    from tests.equivalence.cells import table

    worlds = report.worlds(arguments.device)
    cells = [cell for cell in table(FULL, worlds, arguments.device) if re.search(arguments.k, cell.name, re.IGNORECASE)]
    if not cells:
        print(f"error: -k: no row matches {arguments.k!r}; e.g. -k 'deepspeed 2'", file=sys.stderr)
        return 2
    rows = report.rows(cells, FULL, arguments.device, progress=True)
    return publish("equivalence", rows, style=".1e")


if __name__ == "__main__":
    sys.exit(main())
