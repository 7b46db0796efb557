"""Federated averaging of McMahan's 2NN, as Flower's users write it."""
