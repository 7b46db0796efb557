"""Machines that are not there: network namespaces of Linux that reach each other by one router.

>>> with Namespaces(["alice", "bob"]) as machines:
...     machines.start("alice", [sys.executable, "-m", ...])
...     machines.unplug("bob")          # packets vanish, and nobody is told

Each has an address of its own, and a process in one sees no other network than this. Delays come from `relay`, run on
the router, since not every kernel can delay packets. It needs root and `ip`; `missing` says what is not there.
"""

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

ROUTER = "router"
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


@cache
def missing() -> str:
    """What this machine lacks, or nothing."""
    if not shutil.which("ip"):
        return "needs the command `ip`"
    if os.geteuid():
        return "needs root"
    name = f"tacit-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    tried = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "two"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"needs virtual links: {tried.stderr.strip()}" if tried.returncode else ""


class Namespaces:
    """Machines by name; a context manager, which takes them away.

    Args:
        names: of the machines; the router comes by itself.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._prefix = f"tacit-{secrets.token_hex(4)}"
        self._net = secrets.randbelow(200) + 20
        self.names = list(names)

    def __enter__(self) -> "Namespaces":
        try:
            self._ip("netns", "add", self.of(ROUTER))
            self._inside(ROUTER, "link", "set", "lo", "up")
            for number, name in enumerate(self.names):
                self._ip("netns", "add", self.of(name))
                self._inside(name, "link", "set", "lo", "up")
                self._inside(
                    ROUTER,
                    "link",
                    "add",
                    "name",
                    f"to{number}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    self.of(name),
                )
                self._inside(ROUTER, "address", "add", f"{self.gateway(name)}/24", "dev", f"to{number}")
                self._inside(ROUTER, "link", "set", f"to{number}", "up")
                self._inside(name, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
                self._inside(name, "link", "set", "eth0", "up")
                self._inside(name, "route", "add", "default", "via", self.gateway(name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.names, ROUTER]:
            subprocess.run(["ip", "netns", "delete", self.of(name)], capture_output=True, check=False)

    def of(self, name: str) -> str:
        """The namespace of a machine."""
        return f"{self._prefix}-{name}"

    def address(self, name: str) -> str:
        """A machine's address."""
        return f"10.{self._net}.{self.names.index(name)}.2"

    def gateway(self, name: str) -> str:
        """The router's address on the machine's side: where to reach the others by a relay that runs there."""
        return f"10.{self._net}.{self.names.index(name)}.1"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """A command line that runs a command on a machine."""
        return ["ip", "netns", "exec", self.of(name), *command]

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process on a machine."""
        return subprocess.Popen(self.command(name, command), text=True, **options)

    def run(self, name: str, command: Sequence[str]) -> int:
        """Run a command on a machine to its end, and give its exit status."""
        return subprocess.run(self.command(name, command), capture_output=True, check=False).returncode

    def inside(self, name: str, work: Callable[[], T]) -> T:
        """Do something on a machine, in a thread of its own; threads that this one starts are on the machine, too."""

        def entered() -> T:
            with open(f"/run/netns/{self.of(name)}") as namespace:
                library = ctypes.CDLL(None, use_errno=True)
                if library.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"the namespace of {name} cannot be entered")
            return work()

        with ThreadPoolExecutor(1) as threads:
            return threads.submit(entered).result()

    def forward(self) -> None:
        """Have the router pass packets on between the machines, which otherwise reach each other by a relay on it."""
        command = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        subprocess.run(self.command(ROUTER, command), check=True, capture_output=True)

    def unplug(self, name: str) -> None:
        """Pull a machine's cable."""
        self._inside(ROUTER, "link", "set", f"to{self.names.index(name)}", "down")

    def plug(self, name: str) -> None:
        """Put it back."""
        self._inside(ROUTER, "link", "set", f"to{self.names.index(name)}", "up")

    def _inside(self, name: str, *arguments: str) -> None:
        self._ip("-n", self.of(name), *arguments)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)
