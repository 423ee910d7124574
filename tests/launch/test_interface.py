"""The network that ranks are told to use is that by which the hosts reach each other, over either IP."""

from __future__ import annotations

import socket

import psutil
import pytest

from harness.launch import interface
from harness.launch.job import Job


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_interface_of_an_address(monkeypatch, family):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    held = {one.address: name for name, addresses in psutil.net_if_addrs().items() for one in addresses if one.family == family}
    outside = {address: name for address, name in held.items() if name != "lo" and "%" not in address and psutil.net_if_stats()[name].isup}
    if not outside:
        pytest.skip("this machine has no such address")
    address, name = next(iter(outside.items()))
    for number in range(2):
        assert interface.variables(Job((), (1, 1), address), number) == {"GLOO_SOCKET_IFNAME": name}
    assert interface.variables(Job((), (1,), address), 0) == {}
