"""What a run will take on a given network: rounds times latency, bytes over bandwidth, and computing."""

from __future__ import annotations

from dataclasses import dataclass

from tacit.errors import InputError


@dataclass(frozen=True)
class Network:
    """The link between alice and bob.

    Args:
        round_trip: seconds for a small message to the other party and back; a round of the protocol, in which both
            send at once, waits for half of it.
        bandwidth: bits a second, each way.
    """

    round_trip: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (0 <= self.round_trip < float("inf") and self.bandwidth > 0):
            raise InputError(f"{self}: give a round trip of 0 s or more and a bandwidth above 0")

    def seconds(self, rounds: int, bytes_online: int) -> float:
        """Time on the link of so many rounds that carry so many bytes each way."""
        return rounds * self.round_trip / 2 + 8 * bytes_online / self.bandwidth


NETWORKS = {"lan": Network(0.0002, 1e9), "wan": Network(0.040, 100e6)}
"""A data centre's: 0.2 ms, 1 Gb/s; the internet's: 40 ms, 100 Mb/s."""

SECONDS_PER_PRODUCT = 1e-10
SECONDS_PER_DEALT_BYTE = 2e-10
"""What one core of a current server takes to multiply and add two words, and to use up a dealt byte, within a factor of
about two; `tacit bench inference` measures the machine at hand."""


def parse_network(text: str) -> Network:
    """``lan``, ``wan``, or ``RTT,MBPS`` in milliseconds and megabits a second.

    Raises:
        InputError: none of these.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    try:
        milliseconds, megabits = map(float, text.split(","))
    except ValueError:
        known = ", ".join(NETWORKS)
        raise InputError(f"network {text!r} is unknown: give {known}, or RTT,MBPS such as 20,50 (ms, Mb/s)") from None
    return Network(milliseconds / 1000, megabits * 1e6)
