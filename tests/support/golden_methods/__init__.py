"""Golden cases of the methods that came later, a module each.

A module may define `OPS`, the functions by op as in tests/support/golden_ops.py, and `TRACES`, subclasses of
`tests.support.golden_trace.Trace` by the "method" of a case's meta. Every module of this folder is read; none is listed anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """The modules of this folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def collect(attribute: str) -> dict:
    """The entries of a dictionary that modules may define; each key in one module only."""
    found: dict = {}
    for module in modules():
        entries = getattr(module, attribute, {})
        assert not set(entries) & set(found), f"{module.__name__} defines a second entry of {attribute}"
        found |= entries
    return found
