"""Sums over clients that reveal nothing but the sum.

`interface` says what every protocol offers, `encoding` turns real vectors into residues and back. One server:
`client` and `server` are the two state machines of the masked protocol (docs/spec/masked-sum.md), `masked` runs
them in one process, `attestation` what an auditor checks afterwards. Two servers: `shared_client` and `shared_server`
are the two sides of the shared protocol (docs/spec/shared-sum.md), `shared_bounds` verifies the norms of vectors that
nobody sees, `shared` runs them in one process.
"""
