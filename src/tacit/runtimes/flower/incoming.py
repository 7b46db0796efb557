"""Answers on their way: a node announces a message, and then sends the objects that it is made of.

Flower's own grid waits for objects that were announced, for a second at a time and for minutes in all, and hands out
nothing else meanwhile. But a node may die between announcing and sending, and most answers are there within
milliseconds. So `Incoming` takes what has come when it is asked, and never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS, SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from tacit.errors import CodecError


@dataclass
class _Coming:
    """A message that was announced: what it answers, the objects that it is made of, and those that have come."""

    reply_to: str
    objects: tuple[str, ...]
    since: float
    contents: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Incoming:
    """Announced messages.

    Args:
        pull: gives an object's content by its id, as Flower's ``make_pull_object_fn_protobuf`` makes it.
        confirm: told of a message all of whose objects have come.
        clock: seconds that only go up.
    """

    pull: Callable[[str], bytes]
    confirm: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _coming: dict[str, _Coming] = field(default_factory=dict, init=False)

    @property
    def answered(self) -> frozenset[str]:
        """The messages whose answers were announced and have not come whole."""
        return frozenset(one.reply_to for one in self._coming.values())

    def announce(self, number: str, reply_to: str, tree: ObjectTree) -> None:
        """A message will come.

        Args:
            number: of the message.
            reply_to: the number of the message that it answers.
            tree: of its objects.
        """
        now = self.clock()
        # By then the SuperLink has given up whatever did not come; what is left belongs to questions of long ago.
        for old in [n for n, one in self._coming.items() if now - one.since > 2 * OBJECT_PUSH_SESSION_TTL_SECONDS]:
            del self._coming[old]
        self._coming[number] = _Coming(reply_to, tuple(one.object_id for one in iterate_object_tree(tree)), now)

    def whole(self, asked: Collection[str]) -> Iterator[Message]:
        """The answers to these messages that have come whole; an error of Flower's in place of one that never will.

        Raises:
            httpx.HTTPError: the SuperLink failed.
        """
        for number, coming in list(self._coming.items()):
            if coming.reply_to not in asked:
                continue
            try:
                message = self._assembled(number, coming)
            except ObjectUnavailableError:
                continue
            except httpx.HTTPError:
                raise
            except ObjectPullError:
                message = _failed(coming, "did not send all of its answer")
            except Exception as error:  # whatever Flower's parser comes upon in what is no message of Flower's
                message = _failed(coming, f"answered what is no message of Flower's ({type(error).__name__})")
            del self._coming[number]
            yield message

    def _assembled(self, number: str, coming: _Coming) -> Message:
        for one in coming.objects:
            if one not in coming.contents:
                coming.contents[one] = self.pull(one)
        self.confirm(number)
        message = inflate_object_from_contents(number, coming.contents)
        if not isinstance(message, Message) or message.metadata.reply_to_message_id != coming.reply_to:
            raise CodecError("it is another object than was announced")
        message.metadata.__dict__["_message_id"] = number
        return message


def _failed(coming: _Coming, reason: str) -> Message:
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=coming.reply_to,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))
