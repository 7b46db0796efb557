"""Processes that die at a chosen system call, machines that lose power, and a count of all such faults.

`at_every_call` forks a process for each system call that a piece of work makes on files, and kills it there with
SIGKILL (by ptrace, so at exactly that call and without a hook in the code under test). It also keeps book of what was
synced: `PowerLoss` rebuilds what a disk might hold if the machine had lost power at that moment.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INJECTED: Counter[str] = Counter()
"""How many faults of each kind this test session has injected; printed at its end."""

_CALLS = {
    "x86_64": {
        1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 77: "ftruncate", 82: "rename",
        83: "mkdir", 87: "unlink", 257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 316: "renameat2",
        44: "sendto", 46: "sendmsg",
    },
    "aarch64": {
        64: "write", 66: "writev", 68: "pwrite64", 82: "fsync", 83: "fdatasync", 46: "ftruncate", 276: "renameat2",
        38: "renameat", 34: "mkdirat", 35: "unlinkat", 56: "openat", 206: "sendto", 211: "sendmsg",
    },
}  # fmt: skip
"""The calls by which a process changes what others can see, by their numbers."""
_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_OPTIONS = 0x00100000 | 1  # EXITKILL, TRACESYSGOOD
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = getattr(_libc, "ptrace", None)


def injected(kind: str, count: int = 1) -> None:
    """Count faults."""
    INJECTED[kind] += count


@dataclass
class PowerLoss:
    """What is safely on the disk under a folder: contents and names as they were when they were last synced.

    Args:
        folder: everything in it counts as synced at first.
    """

    folder: Path
    _contents: dict[int, bytes] = field(default_factory=dict)
    _entries: dict[int, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.folder, *self.folder.rglob("*")):
            self.synced(path)

    def synced(self, path: Path) -> None:
        """A file or folder was synced."""
        if not path.is_relative_to(self.folder) or not path.exists():
            return
        inode = path.stat().st_ino
        if path.is_dir():
            self._entries[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._contents[inode] = path.read_bytes()

    def rebuild(self, to: Path, luck: random.Random | None) -> None:
        """What might be there after the power is back.

        Args:
            to: where to put it.
            luck: whether each file's and each folder's unsynced changes reached the disk all the same; never, if not
                given.
        """
        live = {path.stat().st_ino: path for path in (self.folder, *self.folder.rglob("*"))}
        self._rebuild(self.folder.stat().st_ino, to, live, luck)

    def _rebuild(self, inode: int, to: Path, live: dict[int, Path], luck: random.Random | None) -> None:
        lucky = luck is not None and luck.random() < 0.5
        path = live.get(inode)
        if inode in self._entries or (path and path.is_dir()):
            to.mkdir(exist_ok=True)
            entries = self._entries.get(inode, {})
            if lucky and path:
                entries = {entry.name: entry.inode() for entry in os.scandir(path)}
            for name, child in entries.items():
                self._rebuild(child, to / name, live, luck)
        else:
            to.write_bytes(path.read_bytes() if lucky and path else self._contents.get(inode, b""))


@dataclass
class Killed:
    """A process that was killed.

    Args:
        call: at which system call, before it did anything; ``"exit"`` if it was done.
        number: which one of those it would have made.
        said: what it had written to its pipe.
        disk: what had been synced.
    """

    call: str
    number: int
    said: list[str]
    disk: PowerLoss


def killed_at(number: int, work: Callable[[Callable[[str], None]], None], folder: Path) -> Killed:
    """Fork a process that does ``work`` and kill it before its system call of this number.

    Args:
        number: counts from 0 the calls that `_CALLS` knows.
        work: given a function that reports, at once and for certain, what has been done.
        folder: whose syncing is watched.
    """
    names = _CALLS.get(platform.machine())
    if names is None or _ptrace is None:
        pytest.skip("needs ptrace on Linux on a known machine")
    mouth, ear = os.pipe()[::-1]
    disk = PowerLoss(folder)
    child = os.fork()
    if not child:
        _ptrace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        work(lambda text: os.write(mouth, f"{text}\n".encode()))
        os._exit(0)
    os.close(mouth)
    call = _followed(child, number, names, disk)
    with os.fdopen(ear, "rb") as stream:
        said = stream.read().decode().splitlines()
    return Killed(call, number, said, disk)


def at_every_call(
    work: Callable[[Callable[[str], None]], None], folder: Path, before: Callable[[], None], every: int = 1
) -> Iterator[Killed]:
    """Kill processes that do ``work``, one at each of its system calls; the last one is not killed.

    Args:
        work: see `killed_at`.
        folder: what it works on.
        before: puts the folder into its first state, anew for each process.
        every: only every such call.
    """
    number = 0
    while True:
        before()
        killed = killed_at(number, work, folder)
        if killed.call != "exit":
            injected("kill -9 at a system call")
        yield killed
        if killed.call == "exit":
            return
        number += every


def afresh(folder: Path, template: Path) -> None:
    """Make a folder a copy of another."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)


def _followed(child: int, number: int, names: dict[int, str], disk: PowerLoss) -> str:
    os.waitpid(child, 0)
    if _ptrace(_SETOPTIONS, child, None, ctypes.c_void_p(_OPTIONS)):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.skip("this system forbids ptrace")
    count, entering, syncing = 0, True, ""
    while True:
        _ptrace(_SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed"
            return "exit"
        assert os.WIFSTOPPED(status), "it died by itself"
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            continue
        if entering:
            call, first = Path(f"/proc/{child}/syscall").read_text().split()[:2]
            name = names.get(int(call), "")
            if name:
                if count == number:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return name
                count += 1
            syncing = os.readlink(f"/proc/{child}/fd/{int(first, 16)}") if name in ("fsync", "fdatasync") else ""
        elif syncing:
            disk.synced(Path(syncing))
        entering = not entering
