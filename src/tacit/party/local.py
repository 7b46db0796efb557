"""alice, bob and the provider as three processes of this machine, with keys and a cluster file: to try, to test."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tacit import atomic
from tacit.errors import InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.party import cluster_file, service
from tacit.party.address import Address
from tacit.party.children import ENVIRONMENT
from tacit.party.cluster_file import PARTIES, Client, ClusterFile, NetworkFigures, Owner, Parties, Pools, Serving

_HOST = "127.0.0.1"
_STARTING_S = 180.0
_STOPPING_S = 30.0
CLUSTER = "cluster.toml"
_LOOPBACK = NetworkFigures(rtt_ms=0.05, mbps=20_000.0)


def prepare(
    folder: Path,
    *,
    owner: str = "owner",
    clients: Sequence[str] = ("client",),
    serving: Serving | None = None,
    pools: Pools | None = None,
) -> ClusterFile:
    """Make keys and a cluster file in a folder, unless they are there; the cluster.

    Args:
        folder: made if it is missing.
        owner: an owner's name.
        clients: clients' names; each may ask any model.
        serving, pools: settings.
    """
    path = folder / CLUSTER
    if path.exists():
        return cluster_file.read(path)
    atomic.make_private(folder)
    public = {}
    for name in (*PARTIES, owner, *clients):
        identity = Identity.fresh()
        identity.save(folder / f"{name}.key")
        public[name] = identity.public
    ports = iter(free_ports(2 * len(PARTIES)))
    members = {
        name: cluster_file.member(public[name], Address(_HOST, next(ports)), Address(_HOST, next(ports)))
        for name in PARTIES
    }
    cluster = ClusterFile(
        parties=Parties(**members),
        owners={owner: Owner(key=key_text(public[owner]))},
        clients={
            name: Client(key=key_text(public[name]), models=("*",), requests_per_minute=1_000_000) for name in clients
        },
        serving=serving or Serving(),
        pools=pools or Pools(),
        network=_LOOPBACK,
    )
    cluster_file.write(cluster, path)
    return cluster


class LocalService:
    """The three processes; a context manager, which ends them however it is left.

    They end, in good order, even if this process is killed: each holds a pipe whose other end is here alone.

    Args:
        folder: as `prepare` made it; what the processes log goes to ``NAME.log`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cluster = folder, cluster_file.read(folder / CLUSTER)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifelines: dict[str, int] = {}

    def __enter__(self) -> LocalService:
        try:
            for name in PARTIES:
                self.start(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, name: str) -> None:
        """Start one of the three, which does not run."""
        self._let_go(name)
        theirs, self._lifelines[name] = os.pipe()
        try:
            with open(self.folder / f"{name}.log", "ab") as log:
                self._processes[name] = subprocess.Popen(
                    self.command(name, theirs),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs,),
                    env=os.environ | ENVIRONMENT,
                    start_new_session=True,
                )
        finally:
            os.close(theirs)

    def command(self, name: str, lifeline: int) -> list[str]:
        """The command line of one of the three; see `tacit.party.service`."""
        key, folder = self.folder / f"{name}.key", self.folder / name
        return service.command(name, self.folder / CLUSTER, key, folder, lifeline)

    def pid(self, name: str) -> int:
        """The process id of one of the three."""
        return self._processes[name].pid

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """Send one of the three a signal, and wait until it has ended; its exit code."""
        process = self._processes[name]
        process.send_signal(number)
        try:
            return process.wait(_STOPPING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def readiness(self, name: str) -> dict[str, object]:
        """What one of the three says at ``/readyz``; nothing if it does not answer."""
        address = self.cluster.party(name).http_at
        if address is None:
            raise InputError(f"{name} has no http address in the cluster file")
        connection = http.client.HTTPConnection(address.host, address.port, timeout=5.0)
        try:
            connection.request("GET", "/readyz")
            found: dict[str, object] = json.loads(connection.getresponse().read())
            return found
        except (OSError, ValueError, http.client.HTTPException):
            return {}
        finally:
            connection.close()

    def wait_ready(self, names: Sequence[str] = PARTIES, patience: float = _STARTING_S) -> None:
        """Wait until all of these can serve.

        Raises:
            PeerError: one of them has ended, or is not ready in time.
        """
        deadline = time.monotonic() + patience
        for name in names:
            while not (state := self.readiness(name)).get("ready"):
                code = self._processes[name].poll() if name in self._processes else None
                if code is not None or time.monotonic() > deadline:
                    why = f"has ended with exit code {code}" if code is not None else f"is not ready: {state}"
                    raise PeerError(f"{name} {why}; see {self.folder / name}.log")
                time.sleep(0.05)

    def key(self, name: str) -> Identity:
        """The identity of somebody whose key lies in the folder."""
        return Identity.load(self.folder / f"{name}.key")

    def close(self) -> None:
        """End all of them, in good order if they still can."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        deadline = time.monotonic() + _STOPPING_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        for name in list(self._lifelines):
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        """Close this end of a lifeline, if there is one."""
        if name in self._lifelines:
            os.close(self._lifelines.pop(name))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]
