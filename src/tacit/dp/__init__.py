"""Differential privacy: clipping, noise, accounting of what was spent, and the ledger that remembers it.

Nothing here knows of clients or rounds: `tacit.federated.central_privacy` and `tacit.federated.local.dp_sgd` clip and
add the noise, `tacit.federated.privacy` says what that cost.
"""
