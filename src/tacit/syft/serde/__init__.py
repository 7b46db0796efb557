"""Serialization, under PySyft's path; tacit's own is `tacit.wire`."""
