"""Federated training: algorithms as pure functions, selection of clients, initial weights, reference models.

Nothing here knows where it runs: `tacit.runtimes` calls these functions and owns clocks and processes.
"""
