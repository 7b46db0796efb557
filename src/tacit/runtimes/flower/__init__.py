"""The same federated rounds between real processes, carried by Flower.

Flower's SuperLink passes messages, and the pieces here are what speaks at its two ends. `messages` says what is asked
and answered, signed end to end; `client_app` is a Flower ``ClientApp`` over whatever answers at a site; `supernode` is
the node it runs in. `courier` asks many sites at once, `sites` trains and sums through it, `federation` runs the
rounds, `strategy` is Flower's ``Strategy`` around them, and `superlink` how a coordinator becomes a run's ServerApp.

Nothing here uses Flower's own secure aggregation, its simulator, or code that arrives by the network. Its telemetry
and its check for updates are off, unless the environment says otherwise before tacit is imported.

Raises:
    InputError: Flower is not installed, or is of a version that this one was not written for.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from tacit.errors import InputError

SUPPORTED = "1.41"
"""The line of Flower's versions whose interfaces are used here."""


def require_flower() -> str:
    """Flower's version.

    Raises:
        InputError: see the module.
    """
    advice = f"install the one that this version of tacit was written for: pip install 'flwr=={SUPPORTED}.*'"
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise InputError(
            f"training between organisations runs on Flower, which is not installed: {advice}, or tacit[flower]"
        ) from None
    if not f"{found}.".startswith(f"{SUPPORTED}."):
        raise InputError(
            f"Flower {found} is installed, and its interfaces change from one version to the next: {advice}"
        )
    return found


# Read by Flower when it is imported, so this comes first.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
require_flower()
