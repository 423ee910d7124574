"""Hosts h0, h1, ... on this one machine, to try what really happens between hosts: ssh, TCP, names, signals, process tables.

Own to each host: network, host name, process table, /dev/shm, /run, /etc/hosts, root's ~/.ssh, an sshd on port 22. Shared: the disk, like a
cluster's file system, and the clock. Nothing has a name outside: all of it is gone with the processes, however they end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter", "setpriv", "mount")
NETWORK = "10.77.0"
START_S = 20.0
# Process 1 of a host. It waits for its cable; bash then collects the orphans of the host.
_INIT = """
set -e
state=$1 name=$2 home=$(getent passwd 0 | cut -d: -f6)
hostname "$name"
mount --bind "$state/hosts" /etc/hosts
mount --bind "$state/ssh_config" /etc/ssh/ssh_config
[ ! -d "$home/.ssh" ] || mount -t tmpfs -o mode=700 tmpfs "$home/.ssh"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd /run/lock
touch "$state/set-up"
until [ -e "$state/plugged" ]; do sleep 0.02; done
"$SSHD" -D -f "$state/sshd_config" -E "$state/sshd.log" &
until (exec 3<> /dev/tcp/127.0.0.1/22) 2> /dev/null; do sleep 0.02; done
touch "$state/ready"
while :; do sleep 3600 & wait $!; done
"""
# No PAM and no checks of folder modes: both depend on the machine, and neither is what is tried here.
_SSHD = """Port 22
HostKey {state}/hostkey
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100:30:200
"""
# ServerAlive: without it pdsh waits for ever on a host whose cable was pulled.
_SSH = """Host *
IdentityFile {folder}/id
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
BatchMode yes
ConnectTimeout 5
ServerAliveInterval 5
ServerAliveCountMax 3
LogLevel ERROR
"""


@cache
def missing() -> str:
    """Why hosts cannot be had on this machine; empty when they can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    if absent := [name for name in PROGRAMS if _program(name) is None]:
        return f"hosts in namespaces need {', '.join(absent)} (Debian: apt-get install openssh-server openssh-client iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"this machine gives no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """`count` hosts, up until `down`.

    Args:
        folder: an empty folder for keys, configurations and logs; not below /run or /dev/shm.
        count: hosts, up to 100.

    Attributes:
        names: h0, h1, ...
        hostfile: DeepSpeed's, with one slot a host.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.names = folder, [f"h{number}" for number in range(count)]
        self.hostfile = folder / "hostfile"
        self._inits: list[int] = []
        self._parents: list[subprocess.Popen[bytes]] = []
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def address(self, host: int) -> str:
        """The address of a host on its eth0."""
        return f"{NETWORK}.{10 + host}"

    def command(self, host: int, words: Sequence[object]) -> list[str]:
        """The words that run `words` inside a host, in the current folder; the command dies with the process that they start."""
        return [
            "nsenter",
            "-t",
            str(self._inits[host]),
            "-n",
            "-u",
            "-i",
            "-m",
            "-p",
            f"--wd={os.getcwd()}",
            "--",
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            *map(str, words),
        ]

    def run(self, host: int, *words: object, timeout: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command inside a host to its end, with stdout and stderr as text; it is killed after `timeout` seconds."""
        return subprocess.run(self.command(host, words), capture_output=True, text=True, timeout=timeout, env=env, stdin=subprocess.DEVNULL)

    def start(self, host: int, *words: object, **popen: object) -> subprocess.Popen[str]:
        """Start a command inside a host. Killing the answer kills it; to send it another signal, use `inner`."""
        return subprocess.Popen(self.command(host, words), **({"text": True, "stdin": subprocess.DEVNULL} | popen))

    def inner(self, started: subprocess.Popen[str]) -> psutil.Process:
        """The command itself, as this machine numbers it, of what `start` answered."""
        deadline = time.monotonic() + START_S
        while not (children := psutil.Process(started.pid).children()) or children[0].name() in ("nsenter", "setpriv"):
            assert started.poll() is None and time.monotonic() < deadline, "the command did not start"
            time.sleep(0.01)
        return children[0]

    def processes(self, host: int) -> list[psutil.Process]:
        """What runs on a host besides its process 1, its sshd and their helpers."""
        first = psutil.Process(self._inits[host])
        space = os.readlink(f"/proc/{first.pid}/ns/pid")
        found = [process for process in psutil.process_iter() if process.pid != first.pid and _pid_space(process) == space]
        return [process for process in found if process.name() not in ("sshd", "sleep") or process.ppid() != first.pid]

    def own_folder(self, host: int, path: Path | str, *, size: str = "50%") -> None:
        """Give a host a disk of its own at `path`, an existing folder, in place of the shared one; `size` as for tmpfs."""
        assert self.run(host, "mount", "-t", "tmpfs", "-o", f"mode=1777,size={size}", "tmpfs", path).returncode == 0

    def write_hosts(self, host: int, text: str) -> None:
        """Write the /etc/hosts of a host."""
        with open(self.folder / self.names[host] / "hosts", "r+", encoding="utf-8") as stream:  # in place: a new file would not be seen
            stream.truncate()
            stream.write(text)

    def read_hosts(self, host: int) -> str:
        """The /etc/hosts of a host."""
        return (self.folder / self.names[host] / "hosts").read_text(encoding="utf-8")

    def link(self, host: int, *, up: bool) -> None:
        """Plug the network cable of a host in, until it and another one reach each other again, or pull it."""
        self._ip("link", "set", f"p{host}", "up" if up else "down")
        if up:
            other = (host + 1) % len(self.names)
            self._await(lambda: self._reaches(host, other) and self._reaches(other, host), None)

    def _reaches(self, host: int, other: int) -> bool:
        return self.run(host, "bash", "-c", f"exec 3<> /dev/tcp/{self.address(other)}/22").returncode == 0

    def crash(self, host: int) -> None:
        """A host falls silent, and all its processes are gone. The cable first: a kernel says goodbye for its dead processes."""
        self.link(host, up=False)
        self._end(self._parents[host + 1])

    def down(self) -> None:
        """End the hosts and all that runs in them."""
        for parent in self._parents:
            self._end(parent)

    def _end(self, parent: subprocess.Popen[bytes]) -> None:
        for child in psutil.Process(parent.pid).children() if parent.poll() is None else []:
            child.kill()  # process 1 takes its whole process table with it, and is gone when its parent is
        try:
            parent.wait(START_S)
        finally:
            parent.kill()

    def _up(self) -> None:
        self._key(self.folder / "id")
        lines = "".join(f"{self.address(number)} {name}\n" for number, name in enumerate(self.names))
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))
        self._parents.append(self._spawn(["unshare", "--net", "--fork", "--kill-child", "sleep", "infinity"], self.folder / "switch.log"))
        self._switch = self._child(self._parents[0])
        self._await(lambda: _net_space(self._switch) != _net_space(os.getpid()), self.folder / "switch.log")
        self._ip("link", "add", "br0", "type", "bridge")
        self._ip("link", "set", "br0", "up")
        known = []
        for number, name in enumerate(self.names):
            # No "127.0.1.1 h0" line, which Debian writes on real machines: with it gloo and MPI meet on loopback and hang.
            known.append(self._configure(number, name, f"127.0.0.1 localhost\n{lines}"))
        (self.folder / "known_hosts").write_text("".join(known))
        for number, name in enumerate(self.names):
            self._parents.append(self._boot(name))
        for number, name in enumerate(self.names):
            state, parent = self.folder / name, self._parents[number + 1]
            self._await((state / "set-up").exists, state / "log", parent)
            self._inits.append(self._child(parent))
            self._plug(number)
            (state / "plugged").touch()
        for number, name in enumerate(self.names):
            self._await((self.folder / name / "ready").exists, self.folder / name / "log", self._parents[number + 1])

    def _configure(self, number: int, name: str, hosts: str) -> str:
        """Write what a host reads; answers with its line of known_hosts."""
        state = self.folder / name
        state.mkdir()
        self._key(state / "hostkey")
        (state / "hosts").write_text(hosts)
        (state / "sshd_config").write_text(_SSHD.format(state=state, folder=self.folder))
        (state / "ssh_config").write_text(_SSH.format(folder=self.folder))
        kind, key = (state / "hostkey.pub").read_text().split()[:2]
        return f"{name},{self.address(number)} {kind} {key}\n"

    def _boot(self, name: str) -> subprocess.Popen[bytes]:
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return self._spawn(["unshare", *spaces, "bash", "-c", _INIT, "init", str(self.folder / name), name], self.folder / name / "log")

    def _spawn(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A process that dies with this one, and takes its child along."""
        with open(log, "wb") as stream:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=os.environ | {"SSHD": str(_program("sshd"))},
                start_new_session=True,
            )

    def _plug(self, number: int) -> None:
        """Lay a cable from a host into the bridge."""
        inside = ["nsenter", "-t", str(self._inits[number]), "-n"]
        self._ip("link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", str(self._inits[number]))
        self._ip("link", "set", f"p{number}", "master", "br0", "up")
        for words in (["address", "add", f"{self.address(number)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"], ["link", "set", "lo", "up"]):
            subprocess.run([*inside, str(_program("ip")), *words], check=True, capture_output=True)

    def _ip(self, *words: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._switch), "-n", str(_program("ip")), *words], check=True, capture_output=True)

    def _child(self, parent: subprocess.Popen[bytes]) -> int:
        self._await(lambda: psutil.Process(parent.pid).children(), None, parent)
        return psutil.Process(parent.pid).children()[0].pid

    @staticmethod
    def _key(path: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, stdin=subprocess.DEVNULL)

    @staticmethod
    def _await(ready: Callable[[], object], log: Path | None, parent: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            if time.monotonic() > deadline or (parent is not None and parent.poll() is not None):
                raise RuntimeError(f"a host did not start: {log.read_text()[-500:] if log else ''}")
            time.sleep(0.01)


def _pid_space(process: psutil.Process) -> str:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:  # gone meanwhile
        return ""


def _net_space(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Callable[[int], Cluster]]:
    """`hosts(2)` answers with a cluster of two; the same number again, while all its hosts are alive, with the same one.

    Skips, with the reason, where hosts cannot be had. Taken down at the end of the module.
    """
    if reason := missing():
        pytest.skip(reason)
    made: list[Cluster] = []

    def get(count: int, *, fresh: bool = False) -> Cluster:
        for cluster in made:
            if len(cluster.names) == count and not fresh and all(parent.poll() is None for parent in cluster._parents):
                return cluster
        made.append(Cluster(tmp_path_factory.mktemp("cluster"), count))
        return made[-1]

    yield get
    for cluster in made:
        cluster.down()
