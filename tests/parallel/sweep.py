"""Every layout of a larger set against one process.

    python -m tests.parallel.sweep                  every three choices together
    python -m tests.parallel.sweep --strength 4     every four
    python -m tests.parallel.sweep --record         writes benchmarks/records/<machine>/<date>-composition.json

Exit code 1 if any is further from one process than `TOLERANCE`, or fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from llmsys.perf.report import environment, record, record_path, write_record
from tests.parallel.composition import TOLERANCE, errors
from tests.parallel.layouts import DIMENSIONS, Layout, covering, everything, name_of, size_of


def sweep(layouts: Sequence[Layout]) -> Iterator[dict]:
    """Of each layout its name, ranks, seconds, largest errors, and what it raised instead."""
    for layout in layouts:
        start, found, raised = time.perf_counter(), {}, None
        try:
            found = errors(layout)
        except AssertionError as error:
            raised = str(error).strip().splitlines()[-1]
        right = not raised and all(error <= TOLERANCE for error in found.values())
        seconds = round(time.perf_counter() - start, 2)
        facts = {"layout": name_of(layout), "ranks": size_of(layout), "right": right}
        yield {**facts, "errors": found, "raised": raised, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--strength", type=int, default=3, choices=range(1, len(DIMENSIONS) + 1))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    content = environment(["python", "-m", "tests.parallel.sweep", *sys.argv[1:]])
    layouts = covering(DIMENSIONS, options.strength)
    found = []
    for index, row in enumerate(sweep(layouts), 1):
        worst = row["raised"] or f"{max(row['errors'].values()):.1e}"
        print(f"{index}/{len(layouts)} {'right' if row['right'] else 'WRONG'} {worst} {row['layout']}", flush=True)
        found.append(row)
    wrong = sum(not row["right"] for row in found)
    of = sum(1 for _ in everything(DIMENSIONS))
    print(f"{len(found)} layouts of {of}, every {options.strength} choices together: {wrong} wrong")
    if options.record:
        dimensions = {name: list(values) for name, values in DIMENSIONS.items()}
        facts = {"suite": "composition", "strength": options.strength, "tolerance": TOLERANCE, "of": of, "wrong": wrong}
        content = record(content, [], **facts, dimensions=dimensions, layouts=found)
        write_record(record_path(content), content)
        print(record_path(content))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
