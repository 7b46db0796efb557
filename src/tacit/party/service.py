"""``tacit provider`` and ``tacit party alice|bob``: one process that serves until it is told to stop.

``python -m tacit.party.service NAME CLUSTER KEY FOLDER [LIFELINE]`` is what the commands become, in the environment
that processes which compute need from their start (`tacit.party.children`). A *lifeline* is the descriptor of a pipe
whose other end a parent process holds: when the parent is gone, however it went, the pipe ends, and so does this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import uvloop

from tacit.errors import InputError, TacitError, one_line
from tacit.identity import Identity, key_text
from tacit.party import cluster_file, dialing
from tacit.party.alice import Alice
from tacit.party.bob import Bob
from tacit.party.children import ENVIRONMENT
from tacit.party.cluster_file import ALICE, PROVIDER, ClusterFile
from tacit.party.house import House
from tacit.party.lean import leave_compiler_out
from tacit.party.logs import Log
from tacit.party.provider import ProviderProcess


def serve(name: str, cluster: ClusterFile, identity: Identity, folder: Path, lifeline: int | None = None) -> None:
    """Be alice, bob or the provider until SIGTERM, Ctrl-C or the end of the lifeline; then end in good order.

    Args:
        name: which of them.
        cluster: everybody's file.
        identity: its own.
        folder: where it keeps models, tickets and its ledger.
        lifeline: a descriptor of the process that started this one, if it is not to outlive it.

    Raises:
        InputError: the identity is not the one that the cluster file gives this name, or the address is taken.
        DataError: another process uses the folder, or what lies there is damaged or sealed under another key.
    """
    member = cluster.party(name)
    if member.public != identity.public:
        raise InputError(
            f"cluster.toml gives {name} the key {member.key}; the key file holds {key_text(identity.public)}"
        )
    torch.set_num_threads(1)
    log = Log(name)
    with dialing.listen(member.reached_at) as listener:
        uvloop.run(_until_told(name, cluster, identity, folder, log, listener, lifeline))


async def _until_told(
    name: str,
    cluster: ClusterFile,
    identity: Identity,
    folder: Path,
    log: Log,
    listener: socket.socket,
    lifeline: int | None,
) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline is not None:
        loop.add_reader(lifeline, _parent_gone, loop, lifeline, stop)
    if name == PROVIDER:
        await ProviderProcess(cluster, identity, folder, log).run(listener, stop)
        return
    house = House(name, cluster, identity, folder, log)
    await (Alice if name == ALICE else Bob)(house).run(listener, stop)


def _parent_gone(loop: asyncio.AbstractEventLoop, lifeline: int, stop: asyncio.Event) -> None:
    """Nothing is ever written to a lifeline: that it can be read means that it has ended."""
    loop.remove_reader(lifeline)
    stop.set()


def command(name: str, cluster: Path, key: Path, folder: Path, lifeline: int | None = None) -> list[str]:
    """The command line of such a process."""
    line = [sys.executable, "-m", "tacit.party.service", name, str(cluster), str(key), str(folder)]
    return line if lifeline is None else [*line, str(lifeline)]


def become(name: str, cluster: Path, key: Path, folder: Path) -> None:
    """Go on as such a process, under the same process id; does not return.

    Raises:
        InputError: a file cannot be read.
    """
    cluster_file.read(cluster).party(name)
    Identity.load(key)
    arguments = command(name, cluster, key, folder)
    os.execve(arguments[0], arguments, os.environ | ENVIRONMENT)


def main() -> None:
    """Serve as the command line says."""
    leave_compiler_out()
    name, cluster, key, folder = sys.argv[1], *map(Path, sys.argv[2:5])
    lifeline = int(sys.argv[5]) if len(sys.argv) > 5 else None
    try:
        serve(name, cluster_file.read(cluster), Identity.load(key), folder, lifeline)
    except TacitError as error:
        Log(name)("failed", reason=one_line(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
