"""What Python loads first into every process of a service under test: see `crash_points`, beside this."""

import os
import sys

if os.environ.get("TACIT_CRASHES") and {"tacit.party.service", "tacit.party.worker"} & {*sys.orig_argv}:
    import crash_points

    crash_points.install()
