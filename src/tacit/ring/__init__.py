"""Arithmetic that secrets live in: Z/2^64, prime fields, fixed point, and the one source of secret randomness."""
