"""Network namespaces on one bridge: hosts of a small network on this machine, whose links can be cut.

Owns: the bridge, the namespaces, and entering one to start a process there. Needs root and `ip`. Does not know Ray.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why there are no namespaces here; None if there are."""
    if shutil.which("ip") is None:
        return "not installed: ip (apt-get install iproute2)"
    made = subprocess.run(["ip", "link", "add", f"rc{os.getpid()}", "type", "bridge"], capture_output=True, check=False)
    if made.returncode:
        return f"no right to make network namespaces: {made.stderr.decode().strip()}"
    ip("link", "del", f"rc{os.getpid()}")
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """This machine at `address`, and a namespace for each host that is added."""

    def __init__(self) -> None:
        number = os.getpid()
        self._bridge = f"rcb{number}"
        self._net = f"10.{200 + number % 50}.{number // 50 % 250}"
        self._hosts = 1
        self.address = f"{self._net}.1"
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")

    def add(self) -> str:
        """A new host; returns its address."""
        self._hosts += 1
        address = f"{self._net}.{self._hosts}"
        space = self._space(address)
        ip("netns", "add", space)
        ip("link", "add", self._link(address), "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", self._link(address), "master", self._bridge, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        return address

    def cut(self, address: str) -> None:
        """No packet comes to that host, or from it; nobody is told."""
        ip("link", "set", self._link(address), "down")

    @contextmanager
    def at(self, address: str) -> Iterator[None]:
        """What this thread starts meanwhile runs on that host."""
        with open("/proc/thread-self/ns/net") as here, open(Path("/run/netns") / self._space(address)) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def close(self) -> None:
        for host in range(2, self._hosts + 1):
            ip("netns", "del", self._space(f"{self._net}.{host}"))
        ip("link", "del", self._bridge)

    def _space(self, address: str) -> str:
        return f"{self._bridge}-{address.rpartition('.')[2]}"

    def _link(self, address: str) -> str:
        return f"rv{self._bridge[3:]}-{address.rpartition('.')[2]}"


def _enter(space: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
