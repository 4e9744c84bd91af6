"""What this process runs on: environment variables and optional packages.

The only file that reads `os.environ`, and the only one that asks whether an optional package is installed.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from functools import cache


def forced_implementations() -> dict[str, str]:
    """`LLMSYS_IMPL=rms_norm=triton,swiglu=reference` as {"rms_norm": "triton", "swiglu": "reference"}."""
    forced = {}
    for entry in filter(None, os.environ.get("LLMSYS_IMPL", "").split(",")):
        op, separator, implementation = entry.partition("=")
        if not (op and separator and implementation):
            raise ValueError(f"llmsys.env: LLMSYS_IMPL entry {entry!r}, expected op=implementation")
        forced[op.strip()] = implementation.strip()
    return forced


def forced_cpu_isa() -> str | None:
    """`LLMSYS_CPU_ISA`: the instruction set the CPU kernels must use, or None for the best this machine has."""
    return os.environ.get("LLMSYS_CPU_ISA") or None


def explain_choices() -> bool:
    """`LLMSYS_EXPLAIN=1`: print each op's chosen implementation the first time it is chosen."""
    return os.environ.get("LLMSYS_EXPLAIN", "") not in ("", "0")


def thread_settings() -> dict[str, str]:
    """What is set of how threads are made and wait, which speeds depend on."""
    prefixes = ("OMP_", "KMP_", "GOMP_", "MKL_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton runs its kernels on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher told this process: which rank it is, of how many, and where they meet."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this host
    address: str
    port: int
    attempt: int  # how often torchrun has restarted the job
    agent_store: bool  # whether the launcher keeps the store at address:port; else rank 0 does


def job() -> Job | None:
    """The job that torchrun, or a launcher that sets the same variables, started; None without one.

    Errors     ValueError if a variable is missing or not a number, or the rank is not one of the job
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    try:
        rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        found = Job(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            address=os.environ["MASTER_ADDR"],
            port=port,
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except KeyError as error:
        raise ValueError(
            f"llmsys.env: no {error.args[0]} beside the other variables of a job, expected RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT, as torchrun sets them"
        ) from error
    except ValueError as error:
        raise ValueError(f"llmsys.env: {error} in the variables of a job, expected numbers") from error
    if not (0 <= rank < world_size and 0 < port < 2**16):
        raise ValueError(
            f"llmsys.env: RANK={rank}, WORLD_SIZE={world_size}, MASTER_PORT={port}, expected a rank below the world's "
            "size and a port below 65536"
        )
    return found


@cache
def has(package: str) -> bool:
    """Whether `package` can be imported, found without importing it."""
    return importlib.util.find_spec(package) is not None


@cache
def release(distribution: str) -> tuple[int, int] | None:
    """(2, 8) for an installed 2.8.3 of `distribution`, by the name that pip knows; None where there is none."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def restart_with(**variables: str) -> None:
    """Run this process's command anew with these environment variables set; never returns."""
    os.execve(sys.executable, [sys.executable, "-m", "llmsys", *sys.argv[1:]], {**os.environ, **variables})
