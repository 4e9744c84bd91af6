"""A function run by several processes that are a job over Gloo, or over NCCL, for tests.

The processes wait for the next case, so that one costs the time to connect them, not to start them and import torch.
Every case has a default group and groups of its own. One that fails ends the processes it ran on.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from llmsys.parallel import disconnect

TIMEOUT_S = 300.0  # from one rank's answer to the next

# One process imports what tests import, and the ranks are forks of it: they start in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch", "torch.distributed", "llmsys", "llmsys.parallel", "llmsys.models"])
_waiting: list[tuple[BaseProcess, Connection]] = []


def run(size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks.

    Over "nccl", ranks have a GPU each, or share those that there are.
    Errors     AssertionError with the traceback of the first rank that raises; the others are ended
    """
    while len(_waiting) < size:
        _waiting.append(_start())
    ranks = _waiting[:size]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, (_, pipe) in enumerate(ranks):
                pipe.send_bytes(pickle.dumps((folder, rank, size, backend, function, args)))
            return _answers([pipe for _, pipe in ranks])
        except BaseException:
            del _waiting[:size]
            for process, pipe in ranks:
                process.kill()
                process.join()
                pipe.close()
            raise


def _start() -> tuple[BaseProcess, Connection]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _answers(pipes: list[Connection]) -> list[Any]:
    answers: dict[Connection, Any] = {}
    while missing := [pipe for pipe in pipes if pipe not in answers]:
        ready = wait(missing, TIMEOUT_S)
        assert ready, f"ranks {', '.join(str(pipes.index(pipe)) for pipe in missing)}: no answer in {TIMEOUT_S:.0f} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                failure, answers[pipe] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure = "the process ended without a word"
            assert failure is None, f"rank {pipes.index(pipe)}:\n{failure}"
    return [answers[pipe] for pipe in pipes]


def _serve(pipe: Connection) -> None:
    """Run case after case until nobody asks any more."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            disconnect()  # from the last case, which all of its ranks have ended
            folder, rank, size, backend, function, args = pickle.loads(call)
            if backend == "nccl":
                torch.cuda.set_device(rank % torch.cuda.device_count())
                if size > torch.cuda.device_count():  # NCCL wants another GPU for each rank of a host
                    os.environ["NCCL_HOSTID"] = f"process {os.getpid()}"
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
            # By value: not the handles to shared memory that `send` makes of tensors.
            answer = pickle.dumps((None, function(*args)))
            if backend == "nccl":
                disconnect()  # together, as NCCL wants it
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(answer)
