"""Settings of the whole run, and the table at its end: op × implementation × executed or why not."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when llmsys and triton are imported

from tests import harness


def pytest_terminal_summary(terminalreporter):
    if not harness.EXECUTED:
        return
    terminalreporter.section("implementations")
    for (op, runner), outcome in sorted(harness.EXECUTED.items()):
        terminalreporter.write_line(f"{op:<14} {runner:<16} {outcome}")
