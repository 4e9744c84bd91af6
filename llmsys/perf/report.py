"""Benchmark rows, the record they are kept in, and the tables they are shown as."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import llmsys
from llmsys import env

if TYPE_CHECKING:
    from rich.table import Table

RECORD_FORMAT = 1
CHECKOUT = Path(llmsys.__file__).resolve().parent.parent
TOLD_FLAGS = re.compile(r"^(sse4_2|avx|avx2|fma|f16c|avx_vnni|avx512\w*|amx\w*|neon|asimd|bf16|sve2?)$")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of an op in one direction on one shape. `why_not` says why there is no time.

    mode        "ready": the implementation itself, into outputs that exist; "public": what a user calls
    direction   "forward", "backward" or "forward+backward"
    peers       seconds of others in the same rounds, None where `peers_why_not` says why
    """

    op: str
    impl: str
    mode: str
    direction: str
    shape: tuple[int, ...]
    dtype: str
    caches: str  # "cold": buffers in rotation; "warm": the same buffers every call
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    rounds: int = 0
    bytes: int = 0
    flops: int = 0
    ceiling_percent: float | None = None  # of the best copy bandwidth of the run
    copy_bytes_per_s: float | None = None  # median of a plain copy in the same rounds
    peers: dict[str, float | None] = field(default_factory=dict)
    peers_why_not: dict[str, str] = field(default_factory=dict)
    peak_bytes: int | None = None  # the most memory held, weights included, where each contender has its own process
    peers_peak_bytes: dict[str, int] = field(default_factory=dict)
    correct: bool | None = None
    why_not: str | None = None


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """Where and with what a measurement was made: machine, versions, commit, command, date."""
    commit, dirty = _commit()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": {
            "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
            "cpu_flags": [flag for flag in _cpu_field("flags").split() if TOLD_FLAGS.match(flag)],
            "threads": torch.get_num_threads(),
            "gpus": gpus,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "thread_settings": env.thread_settings(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmsys": llmsys.__version__,
        "commit": commit,
        "dirty": dirty,
        "command": list(command),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def busy(environment: dict[str, Any]) -> bool:
    """Whether other processes kept more than a quarter of a core at work in the minute before the measurement."""
    return (environment["load"] or 0) > 0.25


def machine_name(environment: dict[str, Any]) -> str:
    """A folder name for the machine, such as `amd-epyc-avx2-2-threads`."""
    machine = environment["machine"]
    widest = next((isa for isa in ("avx512f", "avx2", "asimd") if isa in machine["cpu_flags"]), "")
    parts = [*machine["gpus"][:1]] or [machine["cpu"], widest, f"{machine['threads']} threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def record(environment: dict[str, Any], rows: Iterable[Row], **more: Any) -> dict[str, Any]:
    """What is written to `benchmarks/records`: the environment, `more`, and the rows."""
    return {"format": RECORD_FORMAT, **environment, **more, "rows": [asdict(row) for row in rows]}


def check_checkout() -> None:
    """Before a measurement that is to be recorded.

    Errors     RuntimeError if llmsys does not run from a source checkout, which keeps records
    """
    if not (CHECKOUT / "benchmarks" / "records").is_dir():
        raise RuntimeError(
            f"llmsys.perf.report: {CHECKOUT} has no benchmarks/records, expected a source checkout to record in; "
            "without --record nothing is written"
        )


def record_path(content: dict[str, Any]) -> Path:
    """Where this checkout keeps the record `content`: a folder for the machine, a file for the day and the suite."""
    return (
        CHECKOUT / "benchmarks" / "records" / machine_name(content) / f"{content['date'][:10]}-{content['suite']}.json"
    )


def write_record(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_record(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The record at `path` and its rows.

    Errors     ValueError if the file is not a record of this format
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"llmsys.perf.read_record: {path} is not JSON ({error}), expected a benchmark record"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != RECORD_FORMAT:
        raise ValueError(f"llmsys.perf.read_record: {path} has format {found!r}, expected {RECORD_FORMAT}")
    rows = []
    for entry in content["rows"]:
        quartiles = entry["quartiles_s"]
        lists = {"shape": tuple(entry["shape"]), "quartiles_s": tuple(quartiles) if quartiles else None}
        rows.append(Row(**{**entry, **lists}))
    return content, rows


def sizes(shape: Sequence[int]) -> str:
    """`4096×4096`; the many sizes of an op over lists as `33.6 M in 16 tensors`."""
    if len(shape) > 7:
        return f"{sum(shape) / 1e6:.1f} M in {len(shape)} tensors"
    return "×".join(map(str, shape))


def rows_table(rows: Sequence[Row]) -> "Table":
    """Rows by case: time, rate, share of the ceiling, and how many times longer each peer takes."""
    from rich.markup import escape
    from rich.table import Table

    reasons = {f"{name}: {reason}" for row in rows for name, reason in row.peers_why_not.items()}
    table = Table(
        title="Median µs (quartiles); % of the copy bandwidth of this run; peers: their time over ours",
        caption="; ".join(sorted(reasons)),
    )
    for heading in ("case", "implementation"):
        table.add_column(heading)
    for heading in ("µs", "GB/s", "%"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("peers", overflow="fold")
    previous = None
    for row in rows:
        case = f"{row.op} {row.mode} {row.direction} {sizes(row.shape)} {row.dtype} {row.caches}"
        if case != previous:
            table.add_section()
        head = ["" if case == previous else case, escape(row.impl)]
        previous = case
        if row.median_s is None or row.quartiles_s is None:
            table.add_row(*head, "–", "", "", escape(row.why_not or ""))
            continue
        first, third = (f"{1e6 * seconds:.1f}" for seconds in row.quartiles_s)
        rate = f"{row.bytes / row.median_s / 1e9:.1f}" if row.bytes else ""
        share = "" if row.ceiling_percent is None else f"{row.ceiling_percent:.0f}"
        ratios = [f"{name} {s / row.median_s:.2f}" for name, s in row.peers.items() if s is not None]
        table.add_row(*head, f"{1e6 * row.median_s:.1f} ({first}–{third})", rate, share, ", ".join(ratios))
    return table


def _cpu_field(name: str) -> str:
    """A field of the first processor in Linux' /proc/cpuinfo, else the empty string."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the source checkout and whether it has uncommitted changes, other than records that were written before
    this one; None where llmsys is not run from one."""
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!benchmarks/records"))


def command_line() -> list[str]:
    """The command as it was typed, with the interpreter and the path of the script left out."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
