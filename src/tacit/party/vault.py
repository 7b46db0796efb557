"""A party's models on its own disk: encrypted, a file for every version, whole or not there.

A file is a header in the clear (who pushed what, public to the parties anyway), a tag over it, and the part of the
model (`tacit.party.models`) as a frame, in sealed pieces of 1 MiB (`tacit.party.sealing.seal_pieces`) that are bound to
the header. What is on the disk depends on no share, difference or seed in a way that anybody without the key could see.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from tacit import atomic
from tacit.errors import CodecError, DataError, InputError
from tacit.party.cluster_file import PARTIES
from tacit.party.models import ModelPart, pack, unpack
from tacit.party.sealing import SALT_BYTES, TAG_BYTES, Pieces, Seal, Unseal, check_key, fresh_salt, seal_pieces, subkey
from tacit.party.tickets import Digest
from tacit.wire import PREFIX_BYTES, Kind, Landing, head_bytes, items_of, parse_header, parse_prefix, parsed, payload_of

_MAGIC = b"tacit vault 1\n"
_LENGTH = struct.Struct("<I")
_SUFFIX = ".model"
_MAX_HEADER_BYTES = 1 << 16


class Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What is known of a model version without opening it.

    Args:
        name: what its owner calls it.
        owner: the owner's public key, as text.
        digest: the version.
        role: whose part lies here.
        number: counts the versions of all models in the order in which they came.
        batch_sizes: those it was pushed for.
    """

    name: str
    owner: str
    digest: Digest
    role: str
    number: int
    batch_sizes: tuple[int, ...]


_entries = msgspec.msgpack.Decoder(Entry)


class Vault:
    """The models of one party, or of the provider. Threads may share it.

    Args:
        folder: made if it is missing; private to the party.
        key: the party's storage key, 32 bytes.
        role: ``"alice"``, ``"bob"`` or ``"provider"``.
    """

    def __init__(self, folder: str | Path, key: bytes, role: str) -> None:
        check_key(key)
        if role not in PARTIES:
            raise InputError(f"{role!r} keeps no models: {', '.join(PARTIES)} do")
        self._folder, self._key, self._role = Path(folder), key, role
        self._guard = threading.Lock()
        atomic.make_private(self._folder)
        for left in self._folder.glob(f"*{atomic.PARTIAL}"):
            left.unlink()

    def save(self, part: ModelPart) -> Entry:
        """Keep a model version; when this returns it is on the disk. Saving the same again changes nothing.

        Args:
            part: this party's, checked.

        Raises:
            InputError: the name belongs to another owner, or the part is another party's.
            StorageFull: the disk is full; nothing is left behind.
            DataError: the disk failed, or a file of the vault is damaged.
        """
        if part.role != self._role:
            raise InputError(f"this vault is {self._role}'s: it does not keep what was meant for {part.role}")
        with self._guard:
            entries = self.list()
            for one in entries:
                if one.digest == part.digest:
                    return one
                if one.name == part.name and one.owner != part.owner:
                    raise InputError(
                        f"the name {part.name!r} belongs to another owner: push the model under another one"
                    )
            number = max((one.number for one in entries), default=0) + 1
            entry = Entry(part.name, part.owner, part.digest, part.role, number, part.batch_sizes)
            atomic.write(self._path(part.digest), self._sealed(entry, part))
        return entry

    def load(self, digest: str) -> ModelPart:
        """Open a model version.

        Raises:
            InputError: it is not here.
            DataError: its file is damaged, or was sealed under another key.
        """
        path = self._path(digest)
        try:
            with open(path, "rb") as file:
                entry, header, salt = self._entry(file, path)
                pieces = Pieces(file, subkey(self._key, salt, "model"), header)
                prefix = parse_prefix(pieces.read(PREFIX_BYTES))
                head = parse_header(prefix, pieces.read(prefix.header_bytes))
                landing = Landing(head.items)
                for view in landing.views:
                    pieces.read_into(view)
                pieces.end()
        except FileNotFoundError:
            raise InputError(f"there is no model version {digest[:12]}… here: has it been pushed?") from None
        except (CodecError, DataError) as error:
            raise _damaged(path, str(error)) from error
        part = unpack(head.body, landing.tensors(), self._role)
        if (part.digest, part.name, part.owner) != (entry.digest, entry.name, entry.owner) or digest != part.digest:
            raise _damaged(path, "it holds another model than it says")
        return part

    def list(self) -> list[Entry]:
        """All model versions, in the order in which they came.

        Raises:
            DataError: a file is damaged, or was sealed under another key.
        """
        entries = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with open(path, "rb") as file:
                entries.append(self._entry(file, path)[0])
        return sorted(entries, key=lambda one: one.number)

    def current(self, name: str) -> Entry:
        """The newest version of a model.

        Raises:
            InputError: there is none of this name.
            DataError: a file is damaged, or was sealed under another key.
        """
        versions = [one for one in self.list() if one.name == name]
        if not versions:
            raise InputError(f"there is no model {name!r} here")
        return versions[-1]

    def delete(self, digest: str) -> None:
        """Forget a model version; if it is not here, nothing happens.

        Raises:
            DataError: the disk failed.
        """
        path = self._path(digest)
        with self._guard, atomic.disk_errors(path):
            path.unlink(missing_ok=True)
            atomic.sync(self._folder)

    def _sealed(self, entry: Entry, part: ModelPart) -> Iterator[bytes]:
        """The pieces of a file."""
        salt = fresh_salt()
        content = msgspec.msgpack.encode(entry)
        header = _MAGIC + salt + _LENGTH.pack(len(content)) + content
        yield header
        yield Seal(subkey(self._key, salt, "entry"), header).close(b"")
        body, tensors = pack(part)
        frame: list[bytes | memoryview] = [head_bytes(Kind.CALL, 0, items_of(tensors), body), *payload_of(tensors)]
        yield from seal_pieces(frame, subkey(self._key, salt, "model"), header)

    def _entry(self, file: BinaryIO, path: Path) -> tuple[Entry, bytes, bytes]:
        """The entry of a file, its header, and its salt."""
        start = file.read(len(_MAGIC) + SALT_BYTES + _LENGTH.size)
        if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + SALT_BYTES + _LENGTH.size:
            raise _damaged(path, "it is no file of a vault of this version")
        salt, (length,) = start[len(_MAGIC) : -_LENGTH.size], _LENGTH.unpack(start[-_LENGTH.size :])
        content = file.read(min(length, _MAX_HEADER_BYTES))
        try:
            Unseal(subkey(self._key, salt, "entry"), start + content).open(file.read(TAG_BYTES))
            return parsed(_entries, content, "its header"), start + content, salt
        except (CodecError, DataError) as error:
            raise _damaged(path, str(error)) from error

    def _path(self, digest: str) -> Path:
        try:
            return self._folder / f"{msgspec.convert(digest, Digest)}{_SUFFIX}"
        except msgspec.ValidationError:
            raise InputError("a model version is named by 64 hexadecimal digits") from None


def require_owner(entry: Entry, owner: str) -> None:
    """Refuse everybody but the owner of a model version, who alone may pull, replace or delete it.

    Args:
        entry: the model version.
        owner: the public key of who asks, as text.

    Raises:
        InputError: it is somebody else.
    """
    if entry.owner != owner:
        raise InputError(
            f"the model {entry.name!r} belongs to another owner: nobody else may have or delete its shares"
        )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} cannot be used: {why}. Delete it, and have the model's owner push it again")
