"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace that sees the other one and nothing else.

    Attributes:
        name: Of the namespace.
        device: Its end of the cable.
        address: Of that.
    """

    name: str
    device: str
    address: str

    def inside(self, *command: str) -> list[str]:
        """Returns a command that runs on this host."""
        # gloo takes the address of the host's name otherwise, which both hosts share here.
        return ["ip", "netns", "exec", self.name, "env", f"GLOO_SOCKET_IFNAME={self.device}", *command]

    def link(self, device: str, state: str) -> None:
        """Sets a network device up or down."""
        subprocess.run(["ip", "-netns", self.name, "link", "set", device, state], check=True)


@contextmanager
def two_hosts() -> Generator[list[Host]]:
    """Two hosts; a test that needs them is skipped where they cannot be made."""
    if not may_make_namespaces():
        pytest.skip("needs root, `ip` and the right to make network namespaces")
    # A device's name has at most 15 characters.
    hosts = [
        Host(f"theworld-{os.getpid()}-{index}", f"tw{os.getpid() % 10**7}-{index}", f"10.231.77.{index + 1}")
        for index in (0, 1)
    ]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        cable = ["ip", "link", "add", hosts[0].device, "netns", hosts[0].name, "type", "veth"]
        subprocess.run([*cable, "peer", "name", hosts[1].device, "netns", hosts[1].name], check=True)
        for host in hosts:
            address = ["address", "add", f"{host.address}/24", "dev", host.device]
            subprocess.run(["ip", "-netns", host.name, *address], check=True)
            for device in (host.device, "lo"):
                host.link(device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False)


def may_make_namespaces() -> bool:
    """Whether this process may make network namespaces, which takes root and a kernel that lets it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"theworld-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made
