"""Two hosts on one machine: sums within the rate of their link, three faults, nothing left however the tool ends."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.parallel import hosts as tool
from benchmarks.parallel.hosts import Hosts, burst_bytes, why_not

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
RANKS = Path(__file__).with_name("hosts_ranks.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[2])}
TIMEOUT_S, GRACE_S = 3, 2  # of a collective; between an agent's failure and the end of the others
RATE = 200e6  # bits/s
CLOSED = r"Connection closed by peer|Connection reset by peer"
LATE = rf"Timed out waiting {TIMEOUT_S}000ms|{CLOSED}"  # the first to be late closes its connections
# Fault → what does it, the ranks that survive it, why each of them raises, on which axis one of them must.
FAULTS = {
    "cut link": (lambda hosts: hosts.cut(1), {0, 1, 2, 3}, LATE, "dp"),
    "killed rank": (lambda hosts: hosts.signal_rank(3, signal.SIGKILL), {0, 1, 2}, CLOSED, ""),
    "stopped rank": (lambda hosts: hosts.signal_rank(3, signal.SIGSTOP), {0, 1, 2}, LATE, ""),
}


class Job:
    """`hosts_ranks.py` under torchrun in each host, once all four ranks are ready."""

    def __init__(self, hosts: Hosts, folder: Path, *options: str, max_restarts: int = 0) -> None:
        self.outputs = [folder / f"host{index}.txt" for index in range(hosts.num_hosts)]
        for index, path in enumerate(self.outputs):
            with path.open("a") as output:
                command = [*TORCHRUN, f"--max-restarts={max_restarts}", str(RANKS), *options]
                hosts.run(index, command, output=output, **ENVIRONMENT)
        self.wait_until_ready()

    def wait_until_ready(self, times: int = 1) -> None:
        until(lambda: len(re.findall(r"rank \d ready", self.text())) == 4 * times, 60, self.text, self.failed)

    def failed(self) -> bool:
        return "ChildFailedError" in self.text()

    def text(self) -> str:
        return "".join(path.read_text() for path in self.outputs)

    def said(self, word: str) -> dict[int, str]:
        """Rank → the rest of its line with this word."""
        return {int(rank): rest for rank, rest in re.findall(rf"rank (\d) {word}(.*)", self.text())}


def until(condition, seconds, explain=lambda: "", hopeless=lambda: False):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and not hopeless(), f"not within {seconds} s\n{explain()}"
        time.sleep(0.02)


def read(path):
    """What is there, or nothing where the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def alive(pid):
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def descendants(pid):
    children = [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]
    return children + [below for child in children for below in descendants(child)]


@needs_hosts
def test_a_job_restarts_and_outlives_a_link_that_falters(tmp_path):
    end = tmp_path / "end"
    with Hosts(2, rate_bits_per_s=RATE) as hosts:
        job = Job(hosts, tmp_path, "--timeout-s", "30", "--until", str(end), max_restarts=1)
        hosts.signal_rank(3, signal.SIGKILL)
        job.wait_until_ready(times=2)
        hosts.cut(1)
        time.sleep(0.3)
        hosts.restore(1)
        end.touch()
        assert hosts.wait(timeout_s=30) == [0, 0], job.text()
    assert job.said("done").keys() == {0, 1, 2, 3}
    for line in job.said("ready").values():
        sent, seconds = re.fullmatch(r": (\d+) bytes in (.+) s", line).groups()
        # However it is done, each host must hear of the other's numbers: as many bytes as are summed.
        assert int(sent) <= RATE / 8 * float(seconds) + burst_bytes(RATE)


@needs_hosts
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, tmp_path):
    strike, survivors, reason, axis = FAULTS[fault]
    with Hosts(2) as hosts:
        job = Job(hosts, tmp_path, "--timeout-s", str(TIMEOUT_S))
        pids = hosts.pids(0) + hosts.pids(1)
        assert len(pids) >= 6  # two agents, four ranks
        strike(hosts)
        try:
            statuses = hosts.wait(timeout_s=10, grace_s=GRACE_S)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{job.text()}")
        assert not any(map(alive, pids))
    assert all(statuses), statuses
    raised = job.said("raised")
    assert raised.keys() == survivors, job.text()
    axes = {"tp": {0: "0, 1", 1: "0, 1", 2: "2, 3", 3: "2, 3"}, "dp": {0: "0, 2", 1: "1, 3", 2: "0, 2", 3: "1, 3"}}
    named = (
        r": llmsys\.parallel\.all_reduce: rank (\d) on axis (tp|dp) \(ranks (.+?)\), called at .+hosts_ranks\.py:\d+"
    )
    for rank, text in raised.items():
        found = re.match(named, text)
        assert found, text
        assert int(found[1]) == rank and found[3] == axes[found[2]][rank]
        assert re.search(reason, text), text
    assert any(f"axis {axis}" in text for text in raised.values()), raised


@needs_hosts
def test_an_agent_that_waits_for_the_others_is_ended():
    """Ranks of host 0 return 0: its agent would wait 300 s for the other, whose rank has failed."""
    command = [*TORCHRUN, "--no-python", "sh", "-c", "exit $GROUP_RANK"]
    with Hosts(2) as hosts:
        for index in range(2):
            hosts.run(index, command, output=subprocess.DEVNULL)
        assert hosts.wait(timeout_s=30, grace_s=0.5) == [-signal.SIGKILL, 1]


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_is_left_when_the_tool_is_killed(number):
    command = [sys.executable, "-m", "benchmarks.parallel.hosts", "--rate", "1gbit", "--", "sleep", "1000"]
    with subprocess.Popen(command) as process:
        try:
            until(lambda: [read(f"/proc/{pid}/comm") for pid in descendants(process.pid)].count("sleep\n") == 2, 20)
            pids = descendants(process.pid)
            bridge = next(pid for pid in pids if "bridge" in links(f"/proc/{pid}/ns/net"))
            namespace = os.open(f"/proc/{bridge}/ns/net", os.O_RDONLY)  # a link in it ends when its other end does
            here = f"/proc/{os.getpid()}/fd/{namespace}"
            assert "port0" in links(here) and "port1" in links(here)
        finally:
            process.send_signal(number)
    assert process.returncode == -number
    until(lambda: not any(map(alive, pids)), 5)
    until(lambda: "port" not in links(here), 5)
    os.close(namespace)
    with Hosts(2, rate_bits_per_s=1e9) as hosts:
        hosts.run(0, ["true"])
        hosts.run(1, ["false"])
        assert hosts.wait(timeout_s=10) == [0, 1]


def links(namespace):
    show = ["nsenter", f"--net={namespace}", "ip", "-brief", "link"]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout


@needs_hosts
def test_what_runs_too_long_or_is_left_behind_is_killed():
    with Hosts(2) as hosts:
        hosts.run(0, ["sh", "-c", "sleep 1000 &"])
        hosts.run(1, ["sleep", "1000"])
        until(lambda: len(hosts.pids(0)) == len(hosts.pids(1)) == 1, 5)
        pids = hosts.pids(0) + hosts.pids(1)
        with pytest.raises(TimeoutError, match=r"hosts \[1\] run after 0.2 s; killed"):
            hosts.wait(timeout_s=0.2)
        assert not any(map(alive, pids))


@needs_hosts
def test_command_line_gives_the_first_failure(capfd):
    assert tool.main(["--hosts", "3", "--", "sh", "-c", "echo $PET_NODE_RANK/$PET_NNODES; exit $PET_NODE_RANK"]) == 1
    assert sorted(capfd.readouterr().out.split()) == ["0/3", "1/3", "2/3"]
    assert tool.main(["--hosts", "1", "--", "sh", "-c", "kill -9 $$"]) == 128 + signal.SIGKILL


@needs_hosts
def test_faults_of_the_command_line(capfd):
    show = ["sh", "-c", "sleep 0.4; ip -brief link show eth0"]
    assert tool.main(["--fault", "cut:1", "--after", "0.1", "--", *show]) == 0
    assert capfd.readouterr().out.count("NO-CARRIER") == 1
    sleep = ["sh", "-c", "RANK=$PET_NODE_RANK exec sleep 0.6"]
    assert tool.main(["--fault", "kill:1", "--after", "0.2", "--", *sleep]) == 128 + signal.SIGKILL


@needs_hosts
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fault", "kill:5", "--after", "0"], "rank 5, expected one that runs now"),
        (["--fault", "cut:2", "--after", "0"], "link set port2 down: Cannot find device"),
        (["--hosts", "0"], "num_hosts 0, expected 1 to 254"),
        (["--timeout", "0.1"], r"hosts \[0, 1\] run after 0.1 s; killed"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(options, message):
    with pytest.raises(SystemExit, match=rf"^benchmarks\.parallel\.hosts: .*{message}"):
        tool.main([*options, "--", "sleep", "5"])


def test_reasons(monkeypatch):
    reason = why_not.__wrapped__
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if all(map(tool.shutil.which, tool.TOOLS)):
        assert reason() == "network namespaces need root"
    monkeypatch.setattr(tool.shutil, "which", lambda name: None if name == "tc" else name)
    assert reason() == "tc not found: iproute2, util-linux and coreutils are needed"
    monkeypatch.setattr(tool, "why_not", lambda: "no such luck")
    with pytest.raises(RuntimeError, match="benchmarks.parallel.hosts: no such luck"), Hosts(2):
        pass


@pytest.mark.parametrize(
    "make, message",
    [
        (partial(Hosts, 0), "num_hosts 0, expected 1 to 254"),
        (partial(Hosts, 255), "num_hosts 255, expected 1 to 254"),
        (partial(Hosts, 2, rate_bits_per_s=0), "rate_bits_per_s 0, expected over 0 or None"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("option", [["--rate", "1 Gb/s"], ["--fault", "cut"]])
def test_bad_command_line(option, capsys):
    with pytest.raises(SystemExit):
        tool.main([*option, "--", "true"])
    assert f"'{option[1]}', expected" in capsys.readouterr().err


@needs_hosts
def test_a_rank_that_is_not_there():
    with Hosts(1) as hosts, pytest.raises(ValueError, match="rank 5, expected one that runs"):
        hosts.signal_rank(5, signal.SIGKILL)
