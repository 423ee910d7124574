"""The network that a host's ranks must use to be reached by those of other hosts."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import psutil

from harness.launch.job import Job

GIVEN = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def variables(job: Job, number: int) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME, where there are several hosts and nobody has set it.

    Gloo takes the address that the host's own name resolves to: where that is 127.0.1.1, as Debian writes it, the ranks of other
    hosts cannot come, and the job hangs half-way.
    """
    if len(job.slots) == 1 or os.environ.get(GIVEN[0]):
        return {}
    name = _of_address(_own_address(job.master, is_master=number == 0))
    return {GIVEN[0]: name} if name else {}


def _own_address(master: str, *, is_master: bool) -> str:
    """The address by which this host and the first one reach each other, or an empty text."""
    with suppress(OSError):
        for family, kind, _, _, address in sorted(socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM), key=lambda one: one[0] != socket.AF_INET):
            if is_master:
                return str(address[0])
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # nothing is sent: the kernel only chooses a way
                return str(probe.getsockname()[0])
    return ""


def _of_address(address: str) -> str:
    """The interface with that address; where it is a loopback, the only other one that is up and has an address of IPv4."""
    states, up = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        held = {one.address: one.family for one in addresses if not one.address.startswith("127.") and one.address != "::1"}
        if states[name].isup and address in held:
            return name
        if states[name].isup and socket.AF_INET in held.values():
            up.append(name)
    return up[0] if len(up) == 1 else ""
