"""Federated learning, under PySyft's path."""
