"""One rank of tests/parallel/test_hosts.py: sums, whose time it prints, then sums over each axis until stopped."""

import argparse
import os
import signal
import time

import torch
import torch.distributed as dist

from llmsys.parallel import CollectiveError, connect, disconnect
from llmsys.parallel.collectives import all_reduce

NUMEL, TIMES = 2**19, 3  # of the sums that are timed: 2 MiB each


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once: ranks share a file, and `print` may write the line's end apart


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--until", help="sum until this file is there; without it, for ever")
    options = parser.parse_args()
    # torchrun sends SIGTERM to a rank whose neighbour has failed. This one lets the collective end first: all report.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # tp within a host, dp from host to host; ranks start when the machine lets them
    mesh = connect(timeout_s=options.timeout_s, connect_timeout_s=300, dp=2, tp=2)
    rank, total = mesh.rank, mesh.size * (mesh.size + 1) / 2
    try:
        all_reduce(torch.zeros(1), mesh.world)  # makes its group
        start = time.perf_counter()  # before the barrier, so that no rank has sent anything yet
        dist.barrier()
        for _ in range(TIMES):
            x = torch.full((NUMEL,), rank + 1.0)
            assert (all_reduce(x, mesh.world) == total).all()
        seconds = time.perf_counter() - start
        say(f"rank {rank} ready: {TIMES * x.nbytes} bytes in {seconds} s")
        done = torch.zeros(1)
        while not done:
            done.fill_(options.until is not None and os.path.exists(options.until))
            all_reduce(all_reduce(done, mesh.tp), mesh.dp)
            time.sleep(0.01)
    except CollectiveError as error:
        say(f"rank {rank} raised: {error}")
        raise
    say(f"rank {rank} done")
    disconnect()


if __name__ == "__main__":
    main()
