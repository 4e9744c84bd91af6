"""A function run by several processes that are a job over Gloo, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# One process imports torch and llmsys, and the ranks are forks of it: they start in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "llmsys", "llmsys.parallel"])


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks.

    Errors     AssertionError with the traceback of the first rank that raises; the others are ended
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(theirs, folder, rank, size, function, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _results(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=300):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, results[rank] = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                failure = "the process ended without a word"
            assert failure is None, f"rank {rank}:\n{failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, folder: str, rank: int, size: int, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        outcome = None, function(*args)
    except BaseException:
        outcome = traceback.format_exc(), None  # type: ignore[assignment]
    pipe.send_bytes(pickle.dumps(outcome))  # by value: not the handles to shared memory that `send` makes of tensors
    pipe.close()
    if outcome[0] is None:
        dist.barrier()  # others may still need this rank
    os._exit(0)
