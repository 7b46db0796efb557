"""Where a process listens: ``host:port``, and ``[host]:port`` for a numeric IPv6 address."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from tacit.errors import InputError

_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True)
class Address:
    """A host, by name or number, and a TCP port.

    Args:
        host: a name, or a number without brackets.
        port: 1 to 65535, or 0 to listen on a free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``alice.example:7401``, ``10.0.0.2:7401`` or ``[fd00::2]:7401``.

    Raises:
        InputError: it is none of these.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    known = _is_ipv6(host[1:-1]) if bracketed else _HOST.fullmatch(host) is not None
    if not known or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise InputError(
            f"{text!r} is not an address: give host:port, such as alice.example:7401, 10.0.0.2:7401 or [fd00::2]:7401"
        )
    return Address(host.strip("[]"), int(port))


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None  # a zone has a meaning on one machine only
    except ValueError:
        return False
