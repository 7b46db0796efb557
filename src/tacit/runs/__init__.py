"""Federated runs that outlive a process: a TOML config, a folder, resuming, comparing."""
