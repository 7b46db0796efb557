"""alice or bob with nothing but a TLS link, as a process: what the test of network namespaces starts in each of them.

python link_peer.py alice HOST:PORT ROUNDS PATIENCE_S     # listens
python link_peer.py bob HOST:PORT ROUNDS PATIENCE_S       # calls
"""

import sys
import time

import torch

from tacit.errors import PeerError
from tacit.identity import Identity
from tacit.party import dialing, tls
from tacit.party.address import parse_address
from tacit.party.transport import Link

ALICE, BOB = (Identity(bytes([number]) * 32) for number in (1, 2))


def main() -> None:
    """Exchange rounds, and print how it went."""
    name, where, rounds, patience = sys.argv[1], parse_address(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    link = _called(where, patience) if name == "alice" else _calling(where, patience)
    print("connected", flush=True)
    own = torch.full((100,), 1 if name == "alice" else 2)
    try:
        for number in range(rounds):
            began = time.monotonic()
            (opened,) = link.exchange([own + number])
            if not torch.equal(opened, torch.full((100,), 3 + 2 * number)):
                sys.exit("a wrong value was opened")
            print(f"round {number} {time.monotonic() - began:.6f}", flush=True)
    except PeerError as error:
        print(f"error {error}", flush=True)
    finally:
        link.close()


def _called(where: dialing.Address, patience: float) -> Link:
    pins = {"bob": BOB.public}
    with dialing.listen(where) as listener:
        print("ready", flush=True)
        return dialing.answer(listener.accept()[0], tls.server_context(ALICE, pins), ALICE, pins, patience)


def _calling(where: dialing.Address, patience: float) -> Link:
    return dialing.dial(where, BOB, "alice", ALICE.public, patience=patience)


if __name__ == "__main__":
    main()
