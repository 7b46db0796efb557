"""Links: frames over a connection, both ways at once, plain and encrypted alike."""

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from links import KINDS, Links, both
from tacit.errors import CodecError, PeerError
from tacit.mpc.lockstep import wire_bytes
from tacit.party.streams import Plain
from tacit.party.transport import Link
from tacit.ring.prg import Prg
from tacit.wire import Kind, head_bytes


@pytest.fixture(params=KINDS)
def links(request: pytest.FixtureRequest) -> Iterator[Links]:
    """alice's link to bob and bob's to alice."""
    alice, bob = KINDS[request.param]()
    yield alice, bob
    alice.close()
    bob.close()


def values(seed: int) -> list[torch.Tensor]:
    prg = Prg(seed.to_bytes(16, "big"))
    words = prg.words((3, 5))
    return [words, words.T[1:], words.to(torch.uint8), words > 0, prg.words((0, 4)), prg.words((1 << 20,)), words[0, 0]]


def test_exchange_adds_words_and_xors_bits_while_large_messages_cross(links: Links) -> None:
    alice, bob = values(1), values(2)
    expected = [x + y if x.dtype == torch.int64 else x ^ y for x, y in zip(alice, bob, strict=True)]
    kept = [value.clone() for value in alice]
    for _ in range(3):
        opened = both(lambda: links[0].exchange(alice), lambda: links[1].exchange(bob))
        for side in opened:
            assert all(map(torch.equal, side, expected))
    assert all(map(torch.equal, alice, kept)), "a share was changed while it was sent"
    assert links[0].bytes_opened == links[1].bytes_opened == 3 * sum(map(wire_bytes, alice))


def test_frames_with_a_body_and_known_tensors(links: Links) -> None:
    alice, bob = links
    words = torch.arange(6).reshape(2, 3)
    alice.send(Kind.CALL, [words], b"body")
    frame = bob.receive(Kind.CALL)
    assert (frame.body, frame.number) == (b"body", 0)
    assert torch.equal(frame.tensors[0], words)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([torch.zeros(4, dtype=torch.int64)], [torch.zeros(5, dtype=torch.int64)]),
        ([torch.zeros(4, dtype=torch.int64)], [torch.zeros(4, dtype=torch.uint8)]),
        ([torch.zeros(2, 2, dtype=torch.bool)], [torch.zeros(4, dtype=torch.bool)]),
    ],
)
def test_parties_at_different_steps_refuse_each_other(links: Links, one: Any, other: Any) -> None:
    def side(link: Link, mine: list[torch.Tensor]) -> Any:
        try:
            return link.exchange(mine)
        finally:
            link.close()

    for error in both(lambda: side(links[0], one), lambda: side(links[1], other)):
        assert isinstance(error, PeerError)


def test_out_of_turn_frames_are_refused(links: Links) -> None:
    alice, bob = links
    alice.send(Kind.CALL)
    with pytest.raises(CodecError, match="alice sent a frame of kind CALL out of turn"):
        bob.receive(Kind.REPLY)


def test_a_repeated_frame_is_refused() -> None:
    ours, theirs = socket.socketpair()
    link = Link(Plain(ours), "bob")
    theirs.sendall(head_bytes(Kind.CALL, 0, []) * 2)
    assert link.receive(Kind.CALL).number == 0
    with pytest.raises(CodecError, match="bob sent frame 0 where 1 is next"):
        link.receive(Kind.CALL)
    theirs.sendall(b"x" * 30)
    with pytest.raises(CodecError):
        link.receive(Kind.CALL)
    link.close()
    theirs.close()


def test_a_closed_connection_names_the_peer(links: Links) -> None:
    links[1].close()
    with pytest.raises(PeerError, match="bob closed the connection"):
        links[0].exchange([torch.zeros(10, dtype=torch.int64)])


def test_a_silent_peer_is_given_up(links: Links) -> None:
    links[0].patience = 0.05
    with pytest.raises(PeerError, match=r"bob has been silent for 0\.05 seconds"):
        links[0].exchange([torch.zeros(10, dtype=torch.int64)])


def test_runs_with_different_tags_do_not_mix(links: Links) -> None:
    alice, bob = links
    words = [torch.arange(4)]
    alice.tag = bob.tag = b"one"
    for opened in both(lambda: alice.exchange(words), lambda: bob.exchange(words)):
        assert torch.equal(opened[0], 2 * words[0])
    alice.tag = b"two"
    for error in both(lambda: alice.exchange(words), lambda: bob.exchange(words)):
        assert isinstance(error, CodecError)


def test_frames_of_every_size(links: Links) -> None:
    sizes = [0, 1, 2, 1000, 2047, 2048, 2049, 16384, 16385, 100_000, 1 << 18]

    def speak(link: Link) -> None:
        for size in sizes:
            link.send(Kind.CALL, [torch.arange(size), torch.arange(3) > 1], bytes(size % 7000))

    def hear(link: Link) -> None:
        for size in sizes:
            frame = link.receive(Kind.CALL)
            assert torch.equal(frame.tensors[0], torch.arange(size))
            assert (frame.tensors[1].tolist(), len(frame.body)) == ([False, False, True], size % 7000)

    for speaker, hearer in (links, links[::-1]):
        assert both(lambda link=speaker: speak(link), lambda link=hearer: hear(link)) == [None, None]


def flood(link: Link) -> None:
    for _ in range(100):
        link.send(Kind.CALL, [torch.zeros(1 << 20, dtype=torch.int64)])


def test_a_peer_that_reads_nothing_is_given_up(links: Links) -> None:
    links[0].patience = 0.2
    with pytest.raises(PeerError, match=r"bob has been silent for 0\.2 seconds"):
        flood(links[0])


def test_what_was_sent_before_closing_arrives(links: Links) -> None:
    alice, bob = links
    alice.send(Kind.CALL, [torch.arange(1000)], b"last")
    alice.close()
    assert bob.receive(Kind.CALL).body == b"last"
    with pytest.raises(PeerError, match="alice closed the connection"):
        bob.receive(Kind.CALL)
    with pytest.raises(PeerError):
        flood(bob)


def test_closing_wakes_another_thread_that_waits(links: Links) -> None:
    waiting, closed = both(lambda: links[0].receive(Kind.CALL), lambda: (time.sleep(0.1), links[0].close()))
    assert isinstance(waiting, PeerError)
    assert not isinstance(closed, Exception)
    assert links[0].fileno() == -1


def test_what_came_early_is_told(links: Links) -> None:
    alice, bob = links
    for _ in range(2):
        alice.send(Kind.CALL, body=b"two frames at once")
    for left in (1, 0):
        assert bob.buffered or select.select([bob], [], [], 10)[0]
        bob.receive(Kind.CALL)
        assert bool(bob.buffered or select.select([bob], [], [], 0)[0]) == bool(left)
