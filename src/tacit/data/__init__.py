"""Data sets, and ways to split one over the clients of a federation."""
