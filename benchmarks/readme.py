"""The README's tables of what ran where and of the bars, generated from records.

    python -m benchmarks.readme            rewrite the tables
    python -m benchmarks.readme --check    exit code 1 if they are not what the records say

`<!-- status -->` … `<!-- /status -->` holds what `llmsys doctor --record` found, on every machine that has a record.
`<!-- NAME: benchmarks/records/<machine>/<date>-….json -->` … `<!-- /NAME -->` holds what that record says:

    bars          of ops, beside what they measured
    occupancy     what kernels compiled for a GPU ask of it
    step          a whole step's contenders, and where ours spends its time
    parallel      a step on several ranks beside each peer's
    layouts       loss curves of a job in several layouts, and how far each is from one process
    composition   how many layouts were compared with one process, and how near they are
"""

import re
import sys
from pathlib import Path
from typing import Any

from llmsys.perf.report import CHECKOUT, Row, read_record

COLUMNS = ("subject", "promise", "measured", "status")
Content = dict[str, Any]
BLOCK = re.compile(r"(<!-- (?P<name>\w+): (?P<record>\S+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)
STATUS = re.compile(r"(<!-- status -->\n).*?(<!-- /status -->)", re.DOTALL)
IMPLEMENTATIONS = {
    "cpu[baseline]": "baseline x86-64",
    "cpu[avx2]": "AVX2",
    "cpu[avx512]": "AVX-512",
    "cpu[avx512_bf16]": "with BF16",
    "triton": "Triton",
    "triton, interpreted": "Triton, interpreted",
    "cuda": "CUDA",
    "cuda_simt": "CUDA, simulated",
}


def rendered(readme: str, root: Path) -> str:
    """`readme` with all that is marked made anew.

    Errors     ValueError if there is no marker, one of a name that is none, or a record has no bars
    """
    if not BLOCK.search(readme):
        raise ValueError("benchmarks.readme: no marker, expected <!-- bars: PATH --> … <!-- /bars -->")

    def block(found: re.Match) -> str:
        if found["name"] not in BLOCKS:
            raise ValueError(f"benchmarks.readme: marker {found['name']!r}, expected one of {', '.join(BLOCKS)}")
        content, rows = read_record(root / found["record"])
        return found[1] + BLOCKS[found["name"]](content, rows, found["record"]) + found[4]

    readme = BLOCK.sub(block, readme)
    return STATUS.sub(lambda found: found[1] + _status(root / "benchmarks" / "records") + found[2], readme)


def _status(records: Path) -> str:
    """op × implementation × the machine on which the doctor last ran it; ops that agree share a row."""
    contents = sorted((read_record(path)[0] for path in records.glob("*/*-doctor.json")), key=lambda c: c["date"])
    ran: dict[str, dict[str, str]] = {}
    used: dict[str, str] = {}
    for content in contents:
        for finding in content["ops"]:
            name = finding["implementation"]
            if name == "triton" and not content["machine"]["gpus"]:
                name = "triton, interpreted"
            if name in IMPLEMENTATIONS and finding["right"] is not None:
                where = _place(content, name)
                used[where] = f"{where}: {_run(content)}"
                ran.setdefault(finding["op"], {})[name] = where if finding["right"] else f"WRONG on {where}"
    rows: dict[tuple[str, ...], list[str]] = {}
    for op in sorted(ran):
        rows.setdefault(tuple(ran[op].get(name, "–") for name in IMPLEMENTATIONS), []).append(f"`{op}`")
    lines = [f"| | {' | '.join(IMPLEMENTATIONS.values())} |", "|---" * (1 + len(IMPLEMENTATIONS)) + "|"]
    lines += [f"| {' '.join(ops)} | {' | '.join(cells)} |" for cells, ops in rows.items()]
    places = sorted({place for cells in rows for place in cells if place in used})
    return "\n".join(["", *lines, "", "; ".join(used[place] for place in places) + ".", ""])


def _place(content: Content, implementation: str) -> str:
    """The card or the processor on which an implementation ran."""
    machine = content["machine"]
    if implementation in ("triton", "cuda") and machine["gpus"]:
        return machine["gpus"][0]
    return re.sub(r"\(R\)", "", machine["cpu"])


def _commit(content: Content) -> str:
    return (content["commit"] or "unknown commit")[:12] + (" with uncommitted changes" if content["dirty"] else "")


def _run(content: Content) -> str:
    return f"{content['date'][:10]}, torch {content['torch']}, {_commit(content)}"


def _bars(content: Content, rows: list[Row], record: str) -> str:
    if not content.get("bars"):
        raise ValueError(
            f"benchmarks.readme: {record} has no bars, expected a record of `llmsys bench ops --bars --record`"
        )
    lines = ["| what | bar | measured | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(bar[key] for key in COLUMNS) + " |" for bar in content["bars"]]
    return "\n".join([_origin(content), "", *lines, ""])


def _occupancy(content: Content, rows: list[Row], record: str) -> str:
    lines = ["| target | head dim | kernel | registers | spilled, bytes | shared memory, KiB | warps of an SM |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {kernel['target']} | {kernel['head_dim']} | `{kernel['name']}` | {kernel['registers']} | {kernel['stack']} "
        f"| {kernel['shared'] / 1024:.4g} | {kernel['warps_of_sm']} of 64 |"
        for kernel in content["kernels"]
    ]
    return "\n".join(["", *lines, ""])


def _step(content: Content, rows: list[Row], record: str) -> str:
    lines = ["| | dtype | s | tokens/s | peak memory, MiB |", "|---|---|---|---|---|"]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        ours = [row for row in rows if row.dtype == dtype]
        contenders = [(row.impl, row.median_s, row.peak_bytes) for row in ours]
        contenders += [(name, seconds, ours[0].peers_peak_bytes[name]) for name, seconds in ours[0].peers.items()]
        tokens = ours[0].shape[0] * ours[0].shape[1]
        lines += [
            f"| {name} | {dtype} | {seconds:.2f} | {tokens / seconds:,.0f} | {peak / 2**20:,.0f} |"
            for name, seconds, peak in contenders
            if seconds is not None and peak is not None
        ]
    shares = []
    for dtype, seconds_by_kind in content["seconds_by_kind"].items():
        total = sum(seconds_by_kind.values())
        parts = ", ".join(f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in seconds_by_kind.items())
        shares.append(f"llmsys in {dtype}: {parts}")
    return "\n".join([_origin(content), "", *lines, "", "Where the time goes, " + "; ".join(shares) + ".", ""])


def _parallel(content: Content, rows: list[Row], record: str) -> str:
    """A line for each peer: our figure, its, and its over ours; the last column is our step with our own kernels."""
    lines = ["| ranks | | peer | ms: ours | peer's | × | MiB: ours | peer's | × | ms with our kernels |"]
    lines += ["|---" * 10 + "|"]
    for ours, kernels in ((row, other) for row, _, other in zip(*[iter(rows)] * 3, strict=True)):
        (peer, seconds), *_ = ours.peers.items()
        times = _beside(1e3, ours.median_s, seconds)
        memory = _beside(2**-20, ours.peak_bytes, ours.peers_peak_bytes.get(peer))
        own = f"{1e3 * kernels.median_s:,.0f}" if kernels.median_s else "–"
        lines.append(f"| {ours.shape[0]} | {ours.op} | {peer} | {times} | {memory} | {own} |")
    return "\n".join([_origin(content), "", *lines, ""])


def _layouts(content: Content, rows: list[Row], record: str) -> str:
    apart = dict(content["largest_distance"])
    one, control, *others = apart
    furthest = max(others, key=apart.__getitem__)
    title = f"Loss curves in {len(others)} layouts, and how far each is from one process"
    distance = (
        f"Of {len(others)} layouts in float32 over Gloo, the losses of {len(content['losses'][one])} steps are at most "
        f"{apart[furthest]:.1e} ({furthest}) from those of one process; summing in another order in one process takes "
        f"them {apart[control]:.1e} away. {_ran(content)}"
    )
    return "\n".join(["", f"![{title}]({Path(record).with_suffix('.png')})", "", distance, ""])


def _composition(content: Content, rows: list[Row], record: str) -> str:
    layouts = content["layouts"]
    worst = {key: max(layout["errors"][key] for layout in layouts) for key in layouts[0]["errors"]}
    return (
        f"{len(layouts)} of {content['of']:,} layouts, in which every {content['strength']} values of "
        f"{len(content['dimensions'])} choices are together: in float64 {content['wrong']} are further than "
        f"{content['tolerance']:.0e} from one process. The largest errors over three steps: "
        f"{', '.join(f'{key} {error:.1e}' for key, error in worst.items())}. {_ran(content)}\n"
    )


def _beside(unit: float, ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return "– | – | –"
    return f"{unit * ours:,.0f} | {unit * theirs:,.0f} | {theirs / ours:.2f}"


def _ran(content: Content) -> str:
    """As `_run`, for what has no speed."""
    return f"Ran {_run(content)}: `{' '.join(content['command'])}`."


def _origin(content: Content) -> str:
    machine = content["machine"]
    copy = content["bandwidth_bytes_per_s"]["copy"] / 1e9
    place = ", ".join([*machine["gpus"], machine["cpu"], f"{machine['threads']} threads"])
    return (
        f"Measured {content['date'][:10]} on {place}, "
        f"copy bandwidth {copy:.1f} GB/s, torch {content['torch']}, {_commit(content)}: "
        f"`{' '.join(content['command'])}`."
    )


BLOCKS = {
    "bars": _bars,
    "occupancy": _occupancy,
    "step": _step,
    "parallel": _parallel,
    "layouts": _layouts,
    "composition": _composition,
}


def main(arguments: list[str]) -> int:
    path = CHECKOUT / "README.md"
    old = path.read_text()
    new = rendered(old, CHECKOUT)
    if "--check" not in arguments:
        path.write_text(new)
    elif new != old:
        print("README.md: not what its records say; run `python -m benchmarks.readme`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
