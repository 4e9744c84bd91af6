"""Several hosts on one machine: network namespaces on a bridge, their links shaped, a command in each.

    python -m benchmarks.parallel.hosts --hosts 2 --rate 1gbit -- torchrun --nproc-per-node 2 script.py

runs the command once per host, with torchrun's own variables set (`PET_NNODES`, `PET_NODE_RANK`, `PET_MASTER_ADDR`,
`PET_MASTER_PORT`) and GLOO_SOCKET_IFNAME; `--fault cut:1`, `kill:3` or `stop:3` breaks the job after `--after` seconds.
After `torchrun --max-restarts 1 -m llmsys train …` it goes on from its last checkpoint; for a cut, with `--restore`.

    host 0  eth0 10.77.0.1 ──┐
    host 1  eth0 10.77.0.2 ──┴─ bridge, in a namespace of its own; both ends of each link shaped by `tc tbf`

A host is a network, a process and a mount namespace without a name, whose first process reads a pipe that this
process alone can write to. When this process is gone, even by SIGKILL, the pipe ends, the first process with it, and
the kernel kills all that ran in the host and removes its links: nothing can be left. What a fork of this process
without exec holds open keeps the hosts alive.

What bounds the end of a broken job, read in torch 2.13 (tests/parallel/test_hosts.py breaks one in each way):
- The group's `timeout` bounds a collective whose peer is cut off or stopped; a killed peer closes its sockets at once.
- A rank that fails must exit with a status other than 0. An agent of torchrun whose ranks all returned 0 waits for the
  other agents in `_exit_barrier`, 300 s that no option of torchrun sets; an agent whose ranks failed does not.
- An agent with a failed rank sends its others SIGTERM and, after 30 s that no option sets either, SIGKILL: a stopped
  rank keeps its agent that long (`--shutdown-timeout` counts where the agent itself is sent SIGTERM), and a rank that
  dies of SIGTERM before its own time-out says nothing.
- `Hosts.wait` ends both kinds of waiting: when one host has failed, the others have `grace_s` to end.
- Under `--max-restarts` ranks need names of their own in the agent's store for each attempt, as
  `llmsys.parallel.connect` gives them: else Gloo is given the addresses of the attempt before.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import IO

MASTER_PORT = 29500
TOOLS = ("ip", "tc", "unshare", "nsenter", "env", "cat")
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
# Says back what it is told, which shows that it is there, and ends with its input. Orphans that end leave no zombies.
FIRST_PROCESS = ("env", "--ignore-signal=CHLD", "cat")
PROBE = "ip link add eth0 type veth peer name port && ip link add bridge type bridge && tc qdisc add dev eth0 root "
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


@cache
def why_not() -> str | None:
    """None where hosts can be made, else one short reason."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: iproute2, util-linux and coreutils are needed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run([*NAMESPACES, "sh", "-c", PROBE + _shape(1e6)], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no namespaces, veth, bridge or tbf: {probe.stderr.strip()}"


def burst_bytes(rate_bits_per_s: float) -> int:
    """What a link lets through at once, on top of its rate: a millisecond's worth, at least two large packets."""
    return max(2**17, int(rate_bits_per_s / 8 / 1000))


class Hosts:
    """`num_hosts` hosts that talk over links of `rate_bits_per_s` each way (None: not shaped), within a `with`.

    Errors     RuntimeError where `why_not()` gives a reason; ValueError if num_hosts is not in 1..254, or the rate not
               over 0
    """

    def __init__(self, num_hosts: int, *, rate_bits_per_s: float | None = None) -> None:
        if not 1 <= num_hosts <= 254:
            raise ValueError(f"benchmarks.parallel.hosts: num_hosts {num_hosts}, expected 1 to 254")
        if rate_bits_per_s is not None and not rate_bits_per_s > 0:
            raise ValueError(f"benchmarks.parallel.hosts: rate_bits_per_s {rate_bits_per_s}, expected over 0 or None")
        self.num_hosts, self.rate_bits_per_s = num_hosts, rate_bits_per_s
        self._namespaces: list[subprocess.Popen] = []  # of each host, then of the bridge
        self._first: list[int] = []  # their first processes, by the numbers they have out here
        self._commands: list[tuple[int, subprocess.Popen]] = []

    def __enter__(self) -> Hosts:
        if reason := why_not():
            raise RuntimeError(f"benchmarks.parallel.hosts: {reason}")
        try:
            for _ in range(self.num_hosts + 1):
                self._open()
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all that runs in the hosts, and return when the kernel has done so."""
        for namespace in self._namespaces:
            namespace.stdin.close()
        for namespace in self._namespaces:
            namespace.wait()
            namespace.stdout.close()
        for _, command in self._commands:
            command.wait()
        self._namespaces, self._first, self._commands = [], [], []

    def run(self, index: int, command: Sequence[str], *, output: IO | None = None, **environment: str) -> None:
        """Start `command` in host `index`; what it prints, errors too, goes to `output` (None: where ours goes)."""
        inside = [
            "nsenter",
            f"--target={self._first[index]}",
            "--net",
            "--pid",
            "--mount",
            f"--wdns={os.getcwd()}",
            "--",
        ]
        process = subprocess.Popen(
            [*inside, *command],
            env={**os.environ, **self.environment(index), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
        self._commands.append((index, process))

    def wait(self, *, timeout_s: float | None = None, grace_s: float = 2.0) -> list[int]:
        """The status of each command of `run`, in order, when all have ended: -9 of one that was killed.

        As `srun --kill-on-bad-exit`: when one ends with a status other than 0, the others have `grace_s` to end, then
        all processes of their hosts are killed. So are those that commands leave behind.

        Errors     TimeoutError if commands run after `timeout_s`; they are killed
        """
        start, failed_at = time.monotonic(), None
        while running := [index for index, command in self._commands if command.poll() is None]:
            now = time.monotonic()
            if failed_at is None and any(command.returncode for _, command in self._commands):
                failed_at = now
            if failed_at is not None and now > failed_at + grace_s:
                self.kill(*running)
            elif timeout_s is not None and now > start + timeout_s:
                self.kill(*range(self.num_hosts))
                raise TimeoutError(f"benchmarks.parallel.hosts: hosts {running} run after {timeout_s} s; killed")
            time.sleep(0.02)
        self.kill(*range(self.num_hosts))
        return [command.returncode for _, command in self._commands]

    def kill(self, *indices: int) -> None:
        """Kill all that runs in these hosts. The hosts stay."""
        while pids := [pid for index in indices for pid in self.pids(index)]:
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.01)

    def signal_rank(self, rank: int, number: int) -> None:
        """Send a signal to the process that torchrun started with RANK=`rank`, in whichever host it is."""
        pids = [pid for index in range(self.num_hosts) for pid in self.pids(index) if _has_rank(pid, rank)]
        if not pids:
            raise ValueError(f"benchmarks.parallel.hosts: rank {rank}, expected one that runs now")
        _signal(min(pids), number)  # its children, which have its environment, came later

    def cut(self, index: int) -> None:
        """Pull the cable of host `index`: its packets are lost, and nobody is told."""
        self._ip(-1, f"link set port{index} down")

    def restore(self, index: int) -> None:
        """Put the cable of host `index` back; TCP goes on from where it was."""
        self._ip(-1, f"link set port{index} up")

    def pids(self, index: int) -> list[int]:
        """All that runs in host `index`, by the numbers it has out here."""
        first = self._first[index]
        space = _namespace_of(first)
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return [pid for pid in pids if pid != first and _namespace_of(pid) == space]

    def environment(self, index: int) -> dict[str, str]:
        """The variables that make the command in host `index` one node of a job."""
        master = {"MASTER_ADDR": _address(0), "MASTER_PORT": str(MASTER_PORT)}
        torchrun = {"PET_NNODES": str(self.num_hosts), "PET_NODE_RANK": str(index)}
        torchrun |= {f"PET_{name}": value for name, value in master.items()}
        return {**master, **torchrun, "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}

    def _open(self) -> None:
        command, pipe = [*NAMESPACES, *FIRST_PROCESS], subprocess.PIPE
        # A session of its own: Ctrl-C in a terminal goes to the commands, and to us, who close.
        namespace = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True)
        self._namespaces.append(namespace)
        with suppress(BrokenPipeError):  # what follows says so
            namespace.stdin.write(b"\n")
        if namespace.stdout.read(1) != b"\n":
            raise RuntimeError(f"benchmarks.parallel.hosts: `{' '.join(command)}` failed, as it says above")
        with open(f"/proc/{namespace.pid}/task/{namespace.pid}/children") as children:
            self._first.append(int(children.read()))

    def _connect(self) -> None:
        hosts = range(self.num_hosts)
        self._ip(-1, "link add bridge type bridge", "link set bridge up")
        for i in hosts:
            self._ip(-1, f"link add port{i} type veth peer name eth0 netns {self._first[i]}")
            self._ip(-1, f"link set port{i} master bridge up")
            self._ip(i, f"address add {_address(i)}/24 dev eth0", "link set eth0 up", "link set lo up")
        if self.rate_bits_per_s is not None:
            for i in hosts:
                for namespace, link in ((i, "eth0"), (-1, f"port{i}")):
                    self._tool(namespace, "tc", f"qdisc add dev {link} root {_shape(self.rate_bits_per_s)}")

    def _ip(self, namespace: int, *lines: str) -> None:
        self._tool(namespace, "ip", *lines)

    def _tool(self, namespace: int, tool: str, *lines: str) -> None:
        command = ["nsenter", f"--target={self._first[namespace]}", "--net", tool, "-batch", "-"]
        run = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"benchmarks.parallel.hosts: {tool} {'; '.join(lines)}: {run.stderr.strip()}")


def _shape(rate_bits_per_s: float) -> str:
    return f"tbf rate {round(rate_bits_per_s)}bit burst {burst_bytes(rate_bits_per_s)}b latency 50ms"


def _address(index: int) -> str:
    return f"10.77.0.{index + 1}"


def _namespace_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # it has ended
        return None


def _has_rank(pid: int, rank: int) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return f"RANK={rank}".encode() in environment.read().split(b"\0")
    except OSError:
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


def _rate(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)(bit|kbit|mbit|gbit)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number and bit, kbit, mbit or gbit, as 1gbit")
    return float(found[1]) * UNITS[found[2]]


def _fault(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(cut|kill|stop):(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, expected cut:HOST, kill:RANK or stop:RANK")
    return found[1], int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the first status that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel.hosts", description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate", type=_rate, help="of each link, each way, as 1gbit; without it, not shaped")
    parser.add_argument("--timeout", type=float, help="seconds after which all is killed")
    parser.add_argument("--fault", type=_fault, help="cut:HOST, kill:RANK or stop:RANK")
    parser.add_argument("--after", type=float, default=10.0, help="seconds from the start to the fault")
    parser.add_argument("--restore", type=float, help="seconds from a cut until the link is back; without it, never")
    parser.add_argument("command", nargs="+", help="after --, run in every host")
    options = parser.parse_args(arguments)
    if options.restore is not None and (options.fault is None or options.fault[0] != "cut"):
        parser.error(f"--restore {options.restore:g} without --fault cut:HOST, expected both")
    try:
        statuses = _run(options)
    except (ValueError, RuntimeError, TimeoutError) as error:
        if not str(error).startswith("benchmarks."):
            raise
        sys.exit(str(error))
    status = next(filter(None, statuses), 0)
    return status if status >= 0 else 128 - status


def _run(options: argparse.Namespace) -> list[int]:
    """The command in each host, with its fault; their statuses."""
    with Hosts(options.hosts, rate_bits_per_s=options.rate) as hosts:
        for index in range(options.hosts):
            hosts.run(index, options.command)
        if options.fault:
            time.sleep(options.after)
            kind, target = options.fault
            if kind == "cut":
                hosts.cut(target)
                if options.restore is not None:
                    time.sleep(options.restore)
                    hosts.restore(target)
            else:
                hosts.signal_rank(target, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return hosts.wait(timeout_s=options.timeout)


if __name__ == "__main__":
    sys.exit(main())
