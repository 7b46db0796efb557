"""A Flower SuperNode for a site: it fetches messages from a SuperLink, has the site's ClientApp answer, sends back.

It differs from ``flower-supernode`` in what a hospital's site needs:

- **No code is taken from the network.** Flower's node downloads the app of a run and executes it; this one only ever
  runs the app that it was given.
- **One process answers all the stages of a round**, so that the keys of a secure sum stay in memory between them, and
  PyTorch is imported once and not for each message.
- It asks again after milliseconds while a round goes on, less often if the SuperLink is slow, and after seconds when
  it is quiet.

It speaks Flower's Fleet API through Flower's own client: over TLS, each request signed by the node's key.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from tacit.errors import InputError, PeerError, TacitError

HEARTBEAT = 10.0
"""Seconds between signs of life; the SuperLink takes a node for gone after twice this."""
BRISK, LONGEST_PAUSE, QUIET = 0.03, 0.5, 3.0
"""Seconds between questions for messages: right after one, at most while a round goes on, and when it is quiet."""
POLITE = 5.0
"""A SuperLink that is slow has much to do: wait so many times as long as it took to say that there is nothing."""
ROUND_GOES_ON = 120.0
"""Seconds since the last message after which it is quiet."""


@dataclass(frozen=True)
class LinkAddress:
    """Where a SuperLink is, and how to know that it is the right one.

    Args:
        superlink: host and port.
        root_certificates: a PEM file of the authorities that its certificate must be signed by; ``None`` for those
            that the system trusts.
        insecure: without TLS: for tests on one machine.
    """

    superlink: str
    root_certificates: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.insecure and self.root_certificates is not None:
            raise InputError(
                "a connection without TLS checks no certificate: leave out one of insecure and certificates"
            )
        if self.root_certificates is not None and not self.root_certificates.is_file():
            raise InputError(f"{self.root_certificates} is not a file of certificates")

    def authorities(self) -> bytes | None:
        """The certificates in the file; ``None`` for those that the system trusts."""
        return None if self.root_certificates is None else self.root_certificates.read_bytes()


@dataclass
class SuperNode:
    """A node that answers until it is stopped.

    Args:
        address: of the SuperLink.
        key: the node's, registered with the SuperLink; ``None`` for a new one, where the SuperLink allows that.
        app: what answers.
        tell: told of the connection in words, for a log.
    """

    address: LinkAddress
    key: ec.EllipticCurvePrivateKey | None
    app: ClientApp
    tell: Callable[[str], None]
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _node: Node | None = field(default=None, init=False)

    def stop(self) -> None:
        """Have `run` return when the message at hand is answered."""
        self._stop.set()

    def run(self) -> None:
        """Answer; whatever happens to the connection, come back to it.

        Raises:
            PeerError: the SuperLink does not accept the node, or is not who it must be.
        """
        wait = 0.5
        while not self._stop.is_set():
            try:
                with self._client() as client:
                    node = self._activate(client)
                    wait = 0.5
                    self._serve(client, node)
            except httpx.HTTPStatusError as error:
                # Also what a node hears that comes back before it was missed.
                self.tell(
                    f"the SuperLink does not accept this node ({_said(error)}): is its key registered? trying again"
                )
            except httpx.TransportError as error:
                if "certificate verify failed" in str(error).lower():
                    raise PeerError(
                        f"the SuperLink at {self.address.superlink} is not who it must be: {error}: check its "
                        "certificate and root_certificates"
                    ) from error
                self.tell(f"the SuperLink cannot be reached ({error}); trying again")
            except ValueError as error:
                self.tell(f"the SuperLink answers what is no message of Flower's ({error}); trying again")
            self._stop.wait(wait)
            wait = min(2 * wait, 10.0)

    def _client(self) -> FleetHttpClient:
        key = self.key or ec.generate_private_key(ec.SECP384R1())
        self._public = public_key_to_bytes(key.public_key())
        return FleetHttpClient.from_server_address(
            self.address.superlink,
            self.address.insecure,
            self.address.authorities(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )

    def _activate(self, client: FleetHttpClient) -> Node:
        if self.key is None:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public))
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        try:
            self._node = Node(node_id=client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError:
            # A node that was not missed is active still.
            if self._node is None:
                raise
        self.tell(f"connected to the SuperLink at {self.address.superlink}")
        return self._node

    def _serve(self, client: FleetHttpClient, node: Node) -> None:
        gone = threading.Event()
        heart = threading.Thread(target=self._beat, args=(client, node, gone), name="heartbeat", daemon=True)
        heart.start()
        last, pause = -ROUND_GOES_ON, BRISK
        try:
            while not self._stop.is_set():
                if gone.is_set():
                    raise httpx.ConnectError("its sign of life was not accepted")
                asked = time.monotonic()
                if self._answer_one(client, node):
                    last, pause = time.monotonic(), BRISK
                    continue
                self._stop.wait(max(pause, min(POLITE * (time.monotonic() - asked), LONGEST_PAUSE)))
                pause = min(1.5 * pause, LONGEST_PAUSE) if time.monotonic() - last < ROUND_GOES_ON else QUIET
            client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
        finally:
            gone.set()
            heart.join()

    def _beat(self, client: FleetHttpClient, node: Node, gone: threading.Event) -> None:
        missed = 0
        while not gone.wait(HEARTBEAT / 2 if missed else HEARTBEAT):
            try:
                accepted = client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT))
                missed = 0 if accepted.success else missed + 1
            except (httpx.HTTPError, ValueError):
                missed += 1
            if missed == 3:
                gone.set()

    def _answer_one(self, client: FleetHttpClient, node: Node) -> bool:
        """Fetch a message, have it answered, send the answer; whether there was one."""
        response = client.PullMessages(PullMessagesRequest(node=node))
        if not response.messages_list:
            return False
        run = response.messages_list[0].metadata.run_id
        try:
            message = _fetched(client, node, run, response.message_object_trees[0])
            began = time.monotonic()
            reply = self._answered(message, Context(run, node.node_id, {}, RecordDict(), {}))
            _send(client, node, reply, time.monotonic() - began)
        except httpx.HTTPStatusError as error:
            # The run was stopped, or the message is too old: nobody waits for the answer.
            self.tell(f"a message of Flower run {run} was dropped ({_said(error)})")
        except httpx.HTTPError:
            raise
        except Exception as error:  # whatever Flower's parser comes upon in what is no message of Flower's
            kind = type(error).__name__
            self.tell(f"a message of Flower run {run} could not be read or answered, and was dropped ({kind})")
        return True

    def _answered(self, message: Message, context: Context) -> Message:
        try:
            return self.app(message, context)
        except TacitError as error:
            reason = str(error)
        except Exception as error:  # its text could hold anything of the site's
            reason = f"an error of type {type(error).__name__}"
        self.tell(f"a message {message.metadata.message_type} was not answered: {reason}")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _fetched(client: FleetHttpClient, node: Node, run: int, tree: ObjectTree) -> Message:
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, run),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run),
        return_type=Message,
        # A message is announced before its objects are sent, which takes milliseconds; Flower would wait for seconds.
        initial_backoff=BRISK,
        backoff_cap=LONGEST_PAUSE,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _send(client: FleetHttpClient, node: Node, reply: Message, seconds: float) -> None:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    run = reply.metadata.run_id
    with no_object_id_recompute():
        response = client.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
        )
        push_objects(
            get_all_nested_objects(reply),
            make_push_object_fn_protobuf(client.PushObject, node, run, response.session_id),
            object_ids_to_push=set(response.objects_to_push),
        )


def _said(error: httpx.HTTPStatusError) -> str:
    return f"HTTP {error.response.status_code}: {error.response.text[:200]}"
