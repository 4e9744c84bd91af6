"""One rank of tests/parallel/test_hosts.py: sums, whose time it prints, then more of them until it is stopped."""

import argparse
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUMEL, TIMES = 2**19, 3  # of the sums that are timed: 2 MiB each


def join() -> None:
    """The default group, with its own time-out of minutes: ranks start when the machine lets them.

    Under its own names in the store of torchrun's agent, which outlives a restart: torch 2.13 gives the ranks of the
    next attempt the addresses of the last one's, and Gloo finds nobody there.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=attempt, rank=rank, world_size=world)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once: ranks share a file, and `print` may write the line's end apart


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--until", help="sum until this file is there; without it, for ever")
    options = parser.parse_args()
    # torchrun sends SIGTERM to a rank whose neighbour has failed. This one lets the collective end first: all report.
    signal.signal(signal.SIGTERM, lambda *_: None)
    join()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=options.timeout_s))
    try:
        start = time.perf_counter()  # before the barrier, so that no rank has sent anything yet
        dist.barrier(group)
        for _ in range(TIMES):
            x = torch.full((NUMEL,), float(rank + 1))
            dist.all_reduce(x, group=group)
            assert (x == world * (world + 1) / 2).all()
        seconds = time.perf_counter() - start
        say(f"rank {rank} ready: {TIMES * x.nbytes} bytes in {seconds} s")
        done = torch.zeros(1)
        while not done:
            done.fill_(options.until is not None and os.path.exists(options.until))
            dist.all_reduce(done, group=group)
            time.sleep(0.01)
    except RuntimeError as error:
        say(f"rank {rank} raised: {' '.join(str(error).split())}")
        raise
    say(f"rank {rank} done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
