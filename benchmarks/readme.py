"""The README's table of bars, generated from a record.

    python -m benchmarks.readme            rewrite the table
    python -m benchmarks.readme --check    exit code 1 if it is not what the record says

The opening marker names the record, `<!-- bars: benchmarks/records/<machine>/<date>-bars.json -->`, and
`<!-- /bars -->` ends the table.
"""

import re
import sys
from pathlib import Path
from typing import Any

from llmsys.perf.report import CHECKOUT, read_record

COLUMNS = ("subject", "promise", "measured", "status")
TABLE = re.compile(r"(<!-- bars: (?P<record>\S+) -->\n).*?(<!-- /bars -->)", re.DOTALL)


def rendered(readme: str, root: Path) -> str:
    """`readme` with every marked table made anew.

    Errors     ValueError if there is no marker, or a record has no bars
    """
    if not TABLE.search(readme):
        raise ValueError("benchmarks.readme: no marker, expected <!-- bars: PATH --> … <!-- /bars -->")
    return TABLE.sub(lambda found: found[1] + _table(root / found["record"]) + found[3], readme)


def _table(path: Path) -> str:
    content, _ = read_record(path)
    if not content.get("bars"):
        raise ValueError(
            f"benchmarks.readme: {path} has no bars, expected a record of `llmsys bench ops --bars --record`"
        )
    lines = ["| what | bar | measured | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(bar[key] for key in COLUMNS) + " |" for bar in content["bars"]]
    return "\n".join([_origin(content), "", *lines, ""])


def _origin(content: dict[str, Any]) -> str:
    machine = content["machine"]
    commit = (content["commit"] or "unknown commit")[:12] + (" with uncommitted changes" if content["dirty"] else "")
    copy = content["bandwidth_bytes_per_s"]["copy"] / 1e9
    place = ", ".join([*machine["gpus"], machine["cpu"], f"{machine['threads']} threads"])
    return (
        f"Measured {content['date'][:10]} on {place}, "
        f"copy bandwidth {copy:.1f} GB/s, torch {content['torch']}, {commit}: `{' '.join(content['command'])}`."
    )


def main(arguments: list[str]) -> int:
    path = CHECKOUT / "README.md"
    old = path.read_text()
    new = rendered(old, CHECKOUT)
    if "--check" not in arguments:
        path.write_text(new)
    elif new != old:
        print("README.md: the table of bars is not what its record says; run `python -m benchmarks.readme`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
