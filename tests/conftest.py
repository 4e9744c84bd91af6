"""Settings of the whole run, and the table at its end: op × implementation × executed or why not."""

import os

import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when llmsys and triton are imported

from tests import harness

# Without shrinking, which takes minutes: the examples are small.
phases = (Phase.explicit, Phase.generate)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=10, phases=phases)
settings.register_profile("long", deadline=None, max_examples=300, phases=phases)
settings.load_profile("repeatable")


def pytest_terminal_summary(terminalreporter):
    if not harness.EXECUTED:
        return
    terminalreporter.section("implementations")
    for (op, runner), outcome in sorted(harness.EXECUTED.items()):
        terminalreporter.write_line(f"{op:<14} {runner:<16} {outcome}")
