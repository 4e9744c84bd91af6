"""Processes that are a job over Gloo and answer questions, each question asked of all of them at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

Commands = dict[str, Callable[..., object]]

# One process imports what everybody needs, and the ranks are forks of it: what imports take is nobody's.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.parallel.contenders"])


class Ranks:
    """`size` processes that call `commands(*arguments)` once, then a function in what that returned, when asked.

    Each has one thread. Between questions they wait without using a processor.
    """

    def __init__(self, name: str, size: int, commands: Callable[..., Commands], *arguments: object):
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            served = (theirs, f"file://{self._folder.name}/store", rank, size, commands, arguments)
            process = _context.Process(target=_serve, args=served, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, *request: object) -> list[Any]:
        """What the function that `request` names first returns for the rest of it, by rank.

        Errors     RuntimeError with the traceback of the first rank that fails, or its exit code if it died
        """
        for pipe in self._pipes:
            pipe.send(request)
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(waiting)):
                answers[waiting[pipe]] = self._answer(waiting[pipe])  # type: ignore[index]
        return [answers[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            kind, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError) as error:
            self._processes[rank].join()
            raise RuntimeError(
                f"benchmarks.parallel.ranks: rank {rank} of {self.name} ended with exit code "
                f"{self._processes[rank].exitcode}, expected an answer; -9 is most often the system out of memory"
            ) from error
        if kind == "error":
            raise RuntimeError(f"benchmarks.parallel.ranks: rank {rank} of {self.name} failed:\n{answer}")
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, store: str, rank: int, size: int, commands: Callable[..., Commands], given: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        functions = commands(*given)
        while True:
            name, *arguments = pipe.recv()
            pipe.send_bytes(pickle.dumps(("answer", functions[name](*arguments))))
    except (EOFError, ConnectionError, KeyboardInterrupt):  # nobody asks any more
        os._exit(0)
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        sys.stdout.flush()
        os._exit(1)
