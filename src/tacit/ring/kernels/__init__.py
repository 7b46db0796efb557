"""Compiled loops over words, and the one door to them.

A module of compiled loops is imported by `load` when it is first needed, so ``import tacit`` neither imports numba nor
compiles anything. What was compiled is kept on disk beside the package, or in the user's cache, or nowhere if neither
can be written. Without numba `load` answers ``None`` and the caller takes its plain form in torch, which every compiled
loop equals word for word.

The loops release the interpreter lock and use one thread: a party is given one core, and two parties of one process
do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@cache
def load(name: str) -> ModuleType | None:
    """The module ``name`` of compiled loops, or ``None`` where numba cannot be imported."""
    try:
        import_module("numba")
    except ImportError:
        return None
    return import_module(name)


def compiled(function: F) -> F:
    """Compile a loop at its first call, for the types of that call; used by the modules that `load` imports."""
    njit = import_module("numba").njit
    options = {"nogil": True, "error_model": "numpy"}
    try:
        result: F = njit(function, cache=True, **options)
    except RuntimeError:  # no folder can be written to keep it in
        result = njit(function, **options)
    return result


def written_in_llvm(generator: Callable[..., Any]) -> Any:
    """Let compiled loops call what ``generator``, a numba intrinsic, writes in LLVM's language."""
    return import_module("numba.extending").intrinsic(generator)
