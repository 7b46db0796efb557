"""Where a federated algorithm runs: so far, every client in this process, one after another."""
