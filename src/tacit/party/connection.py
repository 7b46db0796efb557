"""A client of the service for threads: `tacit.connect`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from torch import Tensor

from tacit.errors import InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.party import cluster_file
from tacit.party.client import TIMEOUT_S, Client, Description, Results
from tacit.party.cluster_file import ClusterFile
from tacit.party.jobs.client import Jobs

T = TypeVar("T")


class Connection:
    """A connection to alice and bob; any thread may use it, and several at once. A context manager.

    Made by `connect`. A thread of its own does the talking.

    Args:
        cluster: where the parties are.
        identity: the client's, or the owner's.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tacit client", daemon=True)
        self._thread.start()
        self._cluster, self._identity = cluster, identity
        self._jobs: Jobs | None = None
        try:
            self._client = self.run(_made(cluster, identity))
        except BaseException:
            self._stop()
            raise

    def model(self, name: str) -> RemoteModel:
        """A model that the parties serve; calling it predicts.

        Raises:
            NotPermitted, Refused, PeerError: see `Client.describe`.
        """
        return RemoteModel(self, name, self.run(self.client.describe(name)))

    @property
    def jobs(self) -> Jobs:
        """The training jobs of an owner; one thread at a time may use them.

        Raises:
            InputError: the cluster file knows no owner with this connection's key.
        """
        if self._jobs is None:
            self._jobs = Jobs(self._cluster, self._identity)
        return self._jobs

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have the connection's thread do something; a future of what comes of it, which can be cancelled."""
        if self._loop.is_closed():
            work.close()
            raise InputError("the connection is closed: connect again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the connection's thread do something, and wait for it; an interruption cancels it.

        Raises:
            PeerError: the connection was closed meanwhile; and whatever the work raises.
        """
        future = self.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise PeerError("the connection was closed") from None
        except BaseException:
            future.cancel()
            raise

    @property
    def client(self) -> Client:
        """The client that lives in the connection's thread.

        Raises:
            InputError: the cluster file knows an owner with this key, and no client.
        """
        if self._client is None:
            raise InputError("cluster.toml has an owner with this key and no client: it may ask no model")
        return self._client

    def close(self) -> None:
        """Close the connection; what is being asked fails."""
        if not self._loop.is_closed():
            if self._jobs is not None:
                self._jobs.close()
            if self._client is not None:
                self.run(self._client.close())
            self._stop()

    def _stop(self) -> None:
        self.run(_rest_cancelled())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with contextlib.suppress(OSError):  # a name that is being looked up cannot be given up
            self._loop.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Connection({key_text(self._identity.public)})"


class RemoteModel:
    """A model that alice and bob serve. Made by `Connection.model`.

    Args:
        connection: to them.
        name: of the model.
        description: what it takes.
    """

    def __init__(self, connection: Connection, name: str, description: Description) -> None:
        self._connection, self.name, self.description = connection, name, description

    def __call__(self, *inputs: Tensor, timeout: float = TIMEOUT_S) -> Tensor | Results:
        """Predict in secret; see `Client.ask`."""
        return self._connection.run(self._connection.client.ask(self.name, *inputs, timeout=timeout))

    def submit(self, *inputs: Tensor, timeout: float = TIMEOUT_S) -> concurrent.futures.Future[Tensor | Results]:
        """Ask without waiting; cancelling the future cancels the request."""
        return self._connection.submit(self._connection.client.ask(self.name, *inputs, timeout=timeout))

    def __repr__(self) -> str:
        shapes = ", ".join(str(one.item_shape) for one in self.description.inputs)
        return f"RemoteModel({self.name}, input {shapes})"


def connect(cluster: str | Path | ClusterFile, key: str | Path | Identity) -> Connection:
    """Connect to the parties that a cluster file names, as one of its clients or owners.

    >>> with tacit.connect("cluster.toml", key="clinic.key") as parties:
    ...     logits = parties.model("mnist")(images)

    Args:
        cluster: the cluster file.
        key: the client's key file.

    Raises:
        InputError: a file cannot be read, or the cluster file does not know the key.
    """
    known = cluster if isinstance(cluster, ClusterFile) else cluster_file.read(Path(cluster))
    return Connection(known, key if isinstance(key, Identity) else Identity.load(Path(key)))


async def _rest_cancelled() -> None:
    """Cancel whatever else the loop does."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _made(cluster: ClusterFile, identity: Identity) -> Client | None:
    """The client with this key; none if it is an owner's, who has jobs."""
    owns = any(one.public == identity.public for one in cluster.owners.values())
    asks = any(one.public == identity.public for one in cluster.clients.values())
    return None if owns and not asks else Client(cluster, identity)
