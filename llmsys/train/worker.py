"""A process of its own for each of several runs that are set side by side: their memory can be told apart."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

Commands = dict[str, Callable[..., object]]


class Worker:
    """A process that calls `commands(*arguments)` once, then one of the functions in what that returned, when asked.

    Between questions it waits without using a processor. It runs on as many threads as the process that makes it.
    """

    def __init__(self, name: str, commands: Callable[..., Commands], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        served = (other, torch.get_num_threads(), commands, arguments)
        self.process = context.Process(target=_serve, args=served, daemon=True)
        self.process.start()
        other.close()

    def ask(self, *request: object) -> Any:
        """What the function that `request` names first returns for the rest of it.

        Errors     RuntimeError with the worker's traceback, or its exit code if it died
        """
        try:
            self.pipe.send(request)
            kind, answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RuntimeError(
                f"llmsys.train.Worker: the {self.name} process ended with exit code {self.process.exitcode}, "
                "expected an answer; -9 is most often the system out of memory"
            ) from error
        if kind == "error":
            raise RuntimeError(f"llmsys.train.Worker: the {self.name} process failed:\n{answer}")
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _serve(pipe: Connection, threads: int, commands: Callable[..., Commands], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        functions = commands(*arguments)
        while True:
            name, *given = pipe.recv()
            pipe.send(("answer", functions[name](*given)))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        sys.exit(1)
