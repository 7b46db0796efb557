"""Training at one client: what there is to do, and the solvers that do it."""
