"""A ticket on its way to being used: its seed under a seal, and the file of its corrections.

The file is a frame as `tacit.wire` writes it, with the ticket's serial as its number. Its bytes are uniform to whoever
has no seed; the seal over the seed covers them, so that a changed or truncated file is found out before anything is
computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from tacit.errors import CodecError, DataError, InputError
from tacit.party.sealing import Seal, Unseal
from tacit.party.tickets import Ticket
from tacit.wire import PREFIX_BYTES, Item, Landing, items_of, parse_header, parse_prefix, payload_of


class Voucher(msgspec.Struct, frozen=True):
    """The right to use a ticket once, in this process or in a worker that it is given to; see `redeem`.

    Args:
        ticket: which.
        key: opens its seal and nothing else.
        sealed: its seed.
        path: of the corrections' file; empty if it has none.
    """

    ticket: Ticket
    key: bytes
    sealed: bytes
    path: str = ""

    def __repr__(self) -> str:
        return f"Voucher({self.ticket})"


def redeem(voucher: Voucher) -> tuple[bytes, list[Tensor]]:
    """Seed and corrections of a ticket, whose file is removed.

    Returns:
        The seed, and the corrections in the order in which they were put.

    Raises:
        DataError: the file is missing, truncated or changed: the ticket is lost, and will not be offered again.
    """
    unseal = Unseal(voucher.key, context(voucher.ticket))
    corrections: list[Tensor] = []
    try:
        if voucher.path:
            corrections = _corrections(voucher, unseal)
        return unseal.open(voucher.sealed), corrections
    except (OSError, CodecError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"ticket {voucher.ticket} is lost and will not be used: {why}") from error
    finally:
        if voucher.path:
            Path(voucher.path).unlink(missing_ok=True)


def _corrections(voucher: Voucher, unseal: Unseal) -> list[Tensor]:
    with open(voucher.path, "rb") as file:
        prefix = parse_prefix(head := file.read(PREFIX_BYTES))
        if os.fstat(file.fileno()).st_size != PREFIX_BYTES + prefix.header_bytes + prefix.payload_bytes:
            raise CodecError("its file is truncated")
        head += file.read(prefix.header_bytes)
        landing = Landing(parse_header(prefix, head[PREFIX_BYTES:]).items)
        unseal.cover(head)
        for view in landing.views:
            if file.readinto(view) != len(view):
                raise CodecError("its file is truncated")
            unseal.cover(view)
    return list(landing.tensors())


def covered(
    seal: Seal, head: bytes, announced: Sequence[Item], corrections: Iterable[Tensor]
) -> Iterator[bytes | memoryview]:
    """The pieces of a corrections' file as they come, covered by the ticket's seal.

    Raises:
        InputError: the corrections are not those that were announced.
    """
    seal.cover(head)
    yield head
    due = iter(announced)
    for tensor in corrections:
        if items_of([tensor]) != (next(due, None),):
            raise InputError("the corrections are not those that were announced")
        for piece in payload_of([tensor]):
            seal.cover(piece)
            yield piece
    if next(due, None) is not None:
        raise InputError("fewer corrections came than were announced")


def context(ticket: Ticket) -> bytes:
    """What a ticket's seal is bound to."""
    return msgspec.msgpack.encode(ticket)
