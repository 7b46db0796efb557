"""Answers that come piece by piece: nobody waits for what may never come, and what is no message is an error."""

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity

from tacit.runtimes.flower.incoming import Incoming


class Store:
    """Objects as a SuperLink has them, and the messages that were confirmed."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.gone, self.confirmed, self.pulled = False, [], []
        self.now = 0.0
        self.incoming = Incoming(self.pull, self.confirmed.append, lambda: self.now)

    def pull(self, number: str) -> bytes:
        self.pulled.append(number)
        if number in self.contents:
            return self.contents[number]
        raise ObjectPullError(number, "gone") if self.gone else ObjectUnavailableError(number)

    def announced(self, reply_to: str, text: bytes) -> tuple[str, list[str], dict[str, bytes]]:
        """Announce an answer; its number, the numbers of its objects and their contents."""
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(RecordDict({"said": ConfigRecord({"bytes": text})}), 7, "query.hello")
        message.metadata.__dict__["_reply_to_message_id"] = reply_to
        objects = {number: one.deflate() for number, one in get_all_nested_objects(message).items()}
        number, tree = message.object_id, get_object_tree(message)
        self.incoming.announce(number, reply_to, tree)
        return number, list(objects), objects

    def whole(self, *asked: str) -> list[Message]:
        return list(self.incoming.whole(asked))


@pytest.fixture
def store() -> Store:
    return Store()


def said(message: Message) -> bytes:
    return message.content["said"]["bytes"]


def test_an_answer_is_there_when_all_of_it_is_and_is_fetched_once(store):
    number, order, objects = store.announced("question", b"answer")
    for one in order:
        assert store.whole("question") == []
        assert store.incoming.answered == {"question"}
        store.contents[one] = objects[one]
    (message,) = store.whole("question")
    assert said(message) == b"answer"
    assert (message.metadata.message_id, message.metadata.reply_to_message_id) == (number, "question")
    assert (store.confirmed, store.incoming.answered) == ([number], frozenset())
    assert len(store.pulled) == 2 * len(order)
    assert store.whole("question") == []


def test_one_that_does_not_come_holds_up_nobody(store):
    store.announced("first", b"never")
    _, _, objects = store.announced("second", b"at once")
    store.contents |= objects
    assert [said(message) for message in store.whole("first", "second")] == [b"at once"]
    store.gone = True
    (message,) = store.whole("first")
    assert message.has_error()
    assert message.error.reason == "did not send all of its answer"
    assert message.metadata.reply_to_message_id == "first"


def test_what_nobody_asks_for_is_left_alone_and_forgotten_after_a_while(store):
    store.announced("first", b"late")
    assert store.whole("second") == []
    assert store.pulled == []
    store.now = 1000.0
    store.announced("second", b"new")
    assert store.incoming.answered == {"second"}


@pytest.mark.parametrize("spoilt", [b"", b"Message 0", b"Message  3\0abc", b"RecordDict  0\0", b"Nothing  0\0"])
def test_what_is_no_message_of_flowers_is_an_error_in_its_place(store, spoilt):
    number, _, objects = store.announced("first", b"spoilt")
    _, _, others = store.announced("second", b"whole")
    store.contents = {**objects, **others, number: spoilt}
    wrong, right = store.whole("first", "second")
    assert wrong.error.reason.startswith("answered what is no message of Flower's")
    assert wrong.metadata.reply_to_message_id == "first"
    assert said(right) == b"whole"


def test_an_answer_to_another_question_than_was_announced_is_an_error(store):
    number, _, objects = store.announced("first", b"answer")
    store.contents = objects
    store.incoming.announce(number, "second", ObjectTree(object_id=number))
    (message,) = store.whole("second")
    assert message.has_error()


def test_a_superlink_that_fails_is_the_callers_matter(store):
    store.announced("first", b"answer")

    def fail(number: str) -> bytes:
        raise httpx.ConnectError("no route")

    store.incoming.pull = fail
    with pytest.raises(httpx.ConnectError):
        store.whole("first")
