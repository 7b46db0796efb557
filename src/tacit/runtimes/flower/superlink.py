"""How a coordinator becomes the ServerApp of a run on a SuperLink.

Flower would have the SuperLink start the ServerApp's code in a process of its own. Here the coordinator's process
registers a run, claims its task with the secret that the SuperLink shares with whoever may execute ServerApps, and
speaks to the sites through the ``Grid`` that the claim entitles it to. It keeps the run alive by a sign of life; when
it dies, the SuperLink ends the run within a minute.
"""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from tacit.errors import InputError, PeerError
from tacit.runtimes.flower.incoming import Incoming
from tacit.runtimes.flower.supernode import LinkAddress

HEARTBEAT = 10.0
PATIENCE = 60.0
"""Seconds for which a SuperLink that does not answer is asked again."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
PYPROJECT = """\
[project]
name = "tacit"
version = "{version}"
description = "Names the apps of tacit for Flower; the code is what is installed at each end"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "tacit"

[tool.flwr.app.components]
serverapp = "tacit.runtimes.flower.strategy:Rounds"
clientapp = "tacit.runtimes.flower.client_app:client_app"
"""


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink as its coordinator sees it.

    Args:
        address: where it is.
        secret: that it shares with whoever may execute ServerApps (``--superexec-auth-secret-file``).
    """

    address: LinkAddress
    secret: bytes = field(repr=False)

    @contextmanager
    def run(self, bundle: bytes | None = None) -> Iterator[tuple[int, Grid]]:
        """Be the ServerApp of a new run: its number, and the way to the nodes.

        Args:
            bundle: a Flower app bundle, whose code is for nodes of Flower's own; ``None``: one without code.

        Raises:
            PeerError: the SuperLink cannot be reached, does not know the secret, or has other runs waiting.
        """
        with self._errors(), closing(self._control()) as control, closing(self._executor()) as executor:
            number = _start(control, _named() if bundle is None else bundle)
            token = _claim(executor, number)
        grid = _Grid(self.address, token)
        with closing(grid), self._errors():
            grid.begin()
            dead = threading.Event()
            heart = threading.Thread(target=grid.beat, args=(dead,), name="run heartbeat", daemon=True)
            heart.start()
            outcome, details = SubStatus.FAILED, "the coordinator stopped"
            try:
                yield number, grid
                outcome, details = SubStatus.COMPLETED, ""
            finally:
                dead.set()
                heart.join()
                grid.end(outcome, details)

    def stop(self, number: int) -> None:
        """End a run that was left behind, if it is still there, so that no node works for it any more."""
        # An error means that it is over, or that the SuperLink forgot it.
        with closing(self._control()) as control, suppress(httpx.HTTPError):
            control.StopRun(StopRunRequest(run_id=number))

    def traffic(self, number: int) -> tuple[int, int]:
        """Bytes that nodes have sent and fetched in a run so far, as the SuperLink counts them."""
        with self._errors(), closing(self._control()) as control:
            run = control.ListRuns(ListRunsRequest(run_id=number)).run_dict[number]
        return run.bytes_recv, run.bytes_sent

    def register(self, node: str) -> None:
        """Let the node with this key, in OpenSSH's format, connect; once is enough.

        Raises:
            PeerError: the SuperLink refuses.
        """
        key = load_ssh_public_key(node.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InputError(f"a node's key is one of ECDSA, and not {node[:30]!r}…")
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key))
        with self._errors(), closing(self._control()) as control:
            try:
                control.RegisterNode(request)
            except httpx.HTTPStatusError as error:
                refused = FlowerError.from_json(error.response.text)
                if refused is None or refused.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
            raise PeerError(f"the SuperLink at {self.address.superlink} refuses: {said}") from error
        except httpx.TransportError as error:
            raise PeerError(f"the SuperLink at {self.address.superlink} cannot be reached: {error}") from error

    def _control(self) -> ControlHttpClient:
        interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr")]
        return ControlHttpClient.from_server_address(*_endpoint(self.address), interceptors=interceptors)

    def _executor(self) -> RuntimeHttpClient:
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods={ACQUIRE}),
        ]
        return RuntimeHttpClient.from_server_address(*_endpoint(self.address), interceptors=interceptors)


class _Grid(HttpGrid):
    """Flower's grid, but one that gives up, and leaves it to its user what to do then."""

    def __init__(self, address: LinkAddress, token: str) -> None:
        super().__init__(*_endpoint(address), token=token)
        # Flower's own waits for ever, and sends its process a signal when the SuperLink refuses.
        self._retry_invoker = RetryInvoker(lambda: exponential(max_delay=5), httpx.TransportError, None, PATIENCE)

    def begin(self) -> None:
        """Start the task that was claimed."""
        given = self._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        self.set_run(run_from_proto(given.run))
        client, run = self._runtime_client, given.run.run_id
        self._incoming = Incoming(
            make_pull_object_fn_protobuf(client.PullObject, self.node, run),
            make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, self.node, run),
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`; does not wait for what was announced and has not come, see `tacit.runtimes.flower.incoming`.

        Raises:
            PeerError: what comes is not of Flower.
        """
        asked = frozenset(message_ids)
        # Who asks again for what was announced is told that there is no such message.
        unheard = asked - self._incoming.answered
        try:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unheard))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._incoming.announce(message.metadata.message_id, message.metadata.reply_to_message_id, tree)
        except ValueError as error:
            raise PeerError(f"the SuperLink at {self._addr} answers what is not of Flower: {error}") from error
        return list(self._incoming.whole(asked))

    def beat(self, dead: threading.Event) -> None:
        """Give signs of life until told to stop; whoever uses the grid notices by itself when it is refused."""
        while not dead.wait(HEARTBEAT):
            with suppress(httpx.HTTPError):
                self._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def end(self, outcome: str, details: str) -> None:
        """Say how the task ended."""
        with suppress(httpx.HTTPError):
            self._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))


def _endpoint(address: LinkAddress) -> tuple[str, bool, bytes | None]:
    return address.superlink, address.insecure, address.authorities()


def _named() -> bytes:
    """The bundle that Flower wants: it names tacit's apps and holds no code."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("pyproject.toml", PYPROJECT.format(version=version("tacit")))
    return archive.getvalue()


def _start(control: ControlHttpClient, content: bytes) -> int:
    """Register a run."""
    fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
    number: int = control.StartRun(StartRunRequest(fab=fab)).run_id
    return number


def _claim(executor: RuntimeHttpClient, number: int) -> str:
    """The token of the run's task."""
    claimed = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    if not claimed.token:
        raise PeerError(
            "the SuperLink has no task for this run: something else executes its ServerApps; start it with "
            "--isolation process"
        )
    if claimed.task.run_id != number:
        raise PeerError(
            f"the SuperLink gave out the task of another run, {claimed.task.run_id}, that was waiting: it is lost now; "
            "one coordinator at a time uses a SuperLink"
        )
    token: str = claimed.token
    return token
