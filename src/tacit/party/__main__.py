"""``python -m tacit.party alice|bob|provider``: started by `tacit.party.launch`, not by hand.

The session's token arrives on standard input, where other users of the machine cannot see it; the port on which the
process listens goes to standard output.
"""

from __future__ import annotations

import sys

from tacit.party.process import NAMES, serve


def _announce(port: int) -> None:
    print(port, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m tacit.party {'|'.join(NAMES)}")
    serve(sys.argv[1], bytes.fromhex(sys.stdin.readline()), _announce)
