"""The processes alice, bob and provider: the protocols of `tacit.mpc` over sockets."""
