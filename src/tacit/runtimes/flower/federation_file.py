"""federation.toml: which SuperLink, who coordinates, and which sites may take part; the same file at all of them.

::

    superlink = "superlink.example:9092"
    certificates = "ca.pem"                 # authorities that its TLS certificate must be signed by, beside this file

    [coordinator]
    key = "ed25519:…"                       # as `tacit keys show` prints it

    [[sites]]                               # a site's place in the list is its index; `tacit site show` prints this
    name = "cleveland"
    key = "ed25519:…"
    node = "ecdsa-sha2-nistp384 AAAA…"      # the key of its SuperNode for Flower

Who a site sums with is decided by the keys in its own copy of this file, and by nothing that comes over the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from tacit import toml_file
from tacit.errors import InputError
from tacit.identity import Identity, key_text, parse_key
from tacit.runtimes.flower.supernode import LinkAddress

_DOCUMENTATION = "docs/deploy/federation.md"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class _Coordinator(_Section, frozen=True):
    key: str


class _Site(_Section, frozen=True):
    name: str
    key: str
    node: str


class _File(_Section, frozen=True):
    superlink: str
    coordinator: _Coordinator
    sites: tuple[_Site, ...]
    certificates: str | None = None
    insecure: bool = False


@dataclass(frozen=True)
class Site:
    """One that may take part.

    Args:
        name: for people.
        key: its identity.
        node: the public key of its SuperNode, in OpenSSH's format.
    """

    name: str
    key: bytes
    node: str


@dataclass(frozen=True)
class FederationFile:
    """What federation.toml says.

    Args:
        superlink: where it is, and how to know it.
        coordinator: the identity of whoever runs rounds.
        sites: by index.
    """

    superlink: LinkAddress
    coordinator: bytes
    sites: tuple[Site, ...]

    @classmethod
    def read(cls, path: Path) -> FederationFile:
        """The file at a path.

        Raises:
            InputError: it cannot be read, says what it cannot, or names a site or a key twice.
        """
        return cls.parse(toml_file.read(path), path)

    @classmethod
    def parse(cls, text: str, path: Path) -> FederationFile:
        """A file's text; see `read`.

        Args:
            text: its content.
            path: where it is; paths in it are relative to its folder.
        """
        parsed = toml_file.typed(toml_file.tables(text, str(path)), _File, "", str(path), _DOCUMENTATION)
        if not re.fullmatch(r"\S+:[1-9][0-9]{0,4}", parsed.superlink):
            raise InputError(
                f"{path}: superlink = {parsed.superlink!r}: give host:port, such as superlink.example:9092"
            )
        sites = tuple(Site(site.name, parse_key(site.key), _node_key(site.node, path)) for site in parsed.sites)
        coordinator = parse_key(parsed.coordinator.key)
        for what, values in (
            ("name", [site.name for site in sites]),
            ("key", [key_text(key) for key in (coordinator, *(site.key for site in sites))]),
            ("node", [site.node for site in sites]),
        ):
            if twice := next((value for at, value in enumerate(values) if value in values[:at]), None):
                raise InputError(f"{path}: the {what} {twice} stands there twice: each has its own")
        for site in sites:
            if not _NAME.fullmatch(site.name):
                raise InputError(f"{path}: {site.name!r} is no name: give letters, digits, dots, dashes, underscores")
        certificates = None if parsed.certificates is None else path.parent / parsed.certificates
        return cls(LinkAddress(parsed.superlink, certificates, parsed.insecure), coordinator, sites)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The sites' identities, by index."""
        return tuple(site.key for site in self.sites)


def node_key(identity: Identity) -> ec.EllipticCurvePrivateKey:
    """The private key of a site's SuperNode, derived from the site's identity: one secret file a site is enough.

    ECDSA on P-384, as Flower wants it; of 64 derived bytes modulo the group's order, which is uniform up to 2^-120.
    """
    number = int.from_bytes(identity.storage_key("flower node", 64), "big") % (_ORDER - 1) + 1
    return ec.derive_private_key(number, ec.SECP384R1())


def entry(name: str, identity: Identity) -> str:
    """What a site adds to federation.toml."""
    node = node_key(identity).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f'[[sites]]\nname = "{name}"\nkey = "{key_text(identity.public)}"\nnode = "{node}"\n'


def _node_key(text: str, path: Path) -> str:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(
            f"{path}: node = {text[:40]!r}… is no ECDSA key in OpenSSH's format, as `tacit site show` prints"
        )
    return text
