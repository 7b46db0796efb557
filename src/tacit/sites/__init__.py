"""A site's side of a federated run: its data, what it allows, what it remembers, and what it tells its data officer."""
