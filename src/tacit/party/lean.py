"""Processes of the service do without torch's compiler, which planning would load though nothing is compiled.

A plan is made on the ``meta`` device, whose kernels are torch's reference implementations in Python. Each is wrapped so
that the compiler leaves it alone, and asks for the compiler when it is first called, for this alone: 40 MB and more
than a second of a core in alice, bob, the provider and each worker, before they have planned their first model. The
wrapper remembers its answer in an attribute of the function, so that a function that has one is called as it is.
"""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any

from torch._decomp import global_decomposition_table


def leave_compiler_out() -> None:
    """Have the reference implementations called as they are; for a process in which nothing is compiled.

    With a torch that wraps them in another way nothing happens, and the compiler is loaded as before.
    """
    waiting = [kernel for table in global_decomposition_table.values() for kernel in table.values()]
    seen: set[int] = set()
    while waiting:
        function: Any = waiting.pop()
        if isinstance(function, FunctionType) and id(function) not in seen:
            seen.add(id(function))
            function.__dict__["__dynamo_disable"] = function
            waiting += _wrapped(function)


def _wrapped(function: FunctionType) -> list[Any]:
    """The functions that a wrapper calls: it is a closure over them."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    return found
