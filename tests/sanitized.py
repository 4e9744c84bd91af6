"""The op tests with csrc/cpu and csrc/bindings built with AddressSanitizer and UndefinedBehaviorSanitizer, in a module
of their own under build/sanitized: `python -m tests.sanitized [pytest's arguments]`.

Memory of tensors is watched too: the allocator that PyTorch calls is then AddressSanitizer's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig

import pytest

from tests import build

BUILD = build.ROOT / "build" / "sanitized"
MODULE = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
OPS = ("-q", "tests/ops", "-k", "not triton and not simt and not emulated")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Have llmsys find the sanitized module where it looks for llmsys._C."""
    import torch  # noqa: F401 before _C, as llmsys has it

    spec = importlib.util.spec_from_file_location("llmsys._C", MODULE)
    assert spec is not None and spec.loader is not None
    sys.modules["llmsys._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["llmsys._C"])


def pytest_report_header() -> str:
    from llmsys import _C

    return f"native module: {_C.__file__}"


def main(arguments: list[str]) -> None:
    """Build the module and become a pytest that uses it."""
    import pybind11

    options = (
        *("-DLLMSYS_SANITIZE=ON", "-DLLMSYS_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    subprocess.run(["cmake", "-S", build.ROOT, "-B", BUILD, "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", BUILD], check=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitized", *(arguments or OPS)]
    os.execve(sys.executable, command, build.sanitized_environment())


if __name__ == "__main__":
    main(sys.argv[1:])
