"""`llmsys doctor`: is every implementation of every op right on this machine, which is chosen, why not the others?"""

from __future__ import annotations

import importlib
import importlib.metadata
import json as json_format
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch

import llmsys
from llmsys import _C, env
from llmsys.memory import allocator_state
from llmsys.ops import _op
from llmsys.ops._native import ISAS, instruction_set
from llmsys.ops._op import Op
from llmsys.ops._verify import verify
from llmsys.perf import report

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = Path(llmsys.__file__).parents[1]
LARGEST = 300  # elements of the cases that are run: the interpreter and the simulator are slow


@dataclass(frozen=True)
class Finding:
    """What is known of one implementation of one op on this machine."""

    op: str
    implementation: str
    right: bool | None  # None: it cannot run here
    chosen: bool
    note: str  # why it cannot run, or which result is wrong and by how much


def examine() -> list[Finding]:
    """Run every implementation of every op on its small cases, in every dtype."""
    return [finding for name in _op.names() for finding in _examine_op(_op.get(name))]


def machine() -> dict[str, str]:
    """What the findings hold for."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "llmsys": llmsys.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu kernels": f"{_C.cpu.isa()} of {', '.join(_C.cpu.isas())}; {_C.cpu.threads()} threads",
        "gpu": cuda,
        "cuda kernels": "built" if hasattr(_C, "cuda") else "not built",
        "triton": _triton(),
        "allocator": allocator_state(),
    }


def doctor(
    json: Annotated[bool, "Print JSON instead of a table."] = False,
    record: Annotated[bool, "Write what was found to benchmarks/records, in a source checkout."] = False,
) -> None:
    """Check every kernel on this machine against the reference. Exit code 1 if any is wrong."""
    if record:
        report.check_checkout()
    if env.has("triton") and not torch.cuda.is_available() and not env.triton_interpreted():
        env.restart_with(TRITON_INTERPRET="1")  # read when Triton is imported
    findings = examine()
    ops = [asdict(finding) for finding in findings]
    if json:
        print(json_format.dumps({"machine": machine(), "ops": ops}, indent=1))
    else:
        _print(findings)
    if record:
        content = report.record(report.environment(report.command_line()), [], suite="doctor", ops=ops)
        report.write_record(report.record_path(content), content)
    if any(finding.right is False for finding in findings):
        raise SystemExit(1)


def _examine_op(op: Op) -> Iterator[Finding]:
    cases = importlib.import_module(f"llmsys.ops.{op.name}.cases")
    simulator = _simulator()
    if simulator:
        simulator.register(op)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = op.explain(*cases.inputs(cases.SMALL[-1], torch.float32, device)).chosen
    for name, implementation in op.implementations.items():
        where = device if implementation.devices is None or device in implementation.devices else "cpu"
        reasons = [implementation.reason(where, cases.inputs(cases.SMALL[-1], dtype, where)) for dtype in DTYPES]
        reason = None if None in reasons else reasons[0]
        if name == "cpu" and reason is None:
            for isa in ISAS:
                current = name == chosen and isa == _C.cpu.isa()
                if isa in _C.cpu.isas():
                    with instruction_set(isa):
                        yield _try(op, cases, name, f"cpu[{isa}]", "cpu", current)
                else:
                    yield Finding(op.name, f"cpu[{isa}]", None, False, f"this machine cannot run {isa}")
        elif reason is None:
            yield _try(op, cases, name, name, where, name == chosen)
        else:
            yield Finding(op.name, name, None, False, reason)
    if not simulator:
        yield Finding(op.name, "cuda_simt", None, False, "only in a source checkout, which has tests/simt")


def _try(op: Op, cases: ModuleType, name: str, label: str, device: str, chosen: bool) -> Finding:
    shapes = [shape for shape in cases.SMALL if torch.Size(shape).numel() <= LARGEST][-4:]
    reason = op.implementations[name].reason
    for dtype in DTYPES:
        if reason(device, cases.inputs(cases.SMALL[-1], dtype, device)) is not None:
            continue
        for shape in shapes:
            for verdict in verify(op, cases, name, shape, dtype, device=device):
                if not verdict.right:
                    return Finding(op.name, label, False, chosen, f"{shape} {dtype}: {verdict}")
    return Finding(op.name, label, True, chosen, "")


def _simulator() -> ModuleType | None:
    """The simulator that runs CUDA source on the CPU, which is beside the package in a source checkout."""
    if not (ROOT / "tests" / "simt" / "__init__.py").exists():
        return None
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("tests.simt")


def _triton() -> str:
    if not env.has("triton"):
        return "not installed"
    version = importlib.metadata.version("triton")
    return f"{version}, interpreted on the CPU" if env.triton_interpreted() else version


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("", "", show_header=False, box=None)
    for key, value in machine().items():
        facts.add_row(key, value)
    console.print(facts)
    table = Table("op", "implementation", "right", "chosen", "note")
    words = {True: "[green]yes[/green]", False: "[red]NO[/red]", None: "–"}
    for finding in findings:
        table.add_row(
            finding.op,
            finding.implementation.replace("[", "\\["),
            words[finding.right],
            "yes" if finding.chosen else "",
            finding.note,
        )
    console.print(table)
