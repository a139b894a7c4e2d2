"""Triton's interpreter without the half of its work that comes to nothing; the bits are the same.

A launch replaces triton.language's functions by interpreted ones. Then each call of a device
function, of which one program makes hundreds, replaces them again by the same. And each sum and
product of integers is made again in 64 bits, to see whether it overflows; what comes out is looked
at only in Triton's debug mode.
"""

from contextlib import suppress
from dataclasses import replace
from functools import cache

import triton.language as tl
from triton.runtime import interpreter


class Once:
    """Stands in for the interpreter's _patch_lang: within a launch, each module once."""

    def __init__(self, patch):
        self.patch, self.patched, self.scope = patch, set(), None

    def __call__(self, function):
        """A launch restores what this returns; a device function's call ignores it."""
        if not modules_of(function) <= self.patched:
            scope = self.patch(function)
            self.scope = self.scope or scope
            self.patched |= modules_of(function)
        return self

    def restore(self):
        self.scope.restore()
        self.scope = None
        self.patched.clear()


@cache
def modules_of(function) -> frozenset:
    """Those modules of the language that a function sees."""
    return frozenset(m for m in (tl, tl.core) if any(v is m for v in function.__globals__.values()))


def install() -> None:
    with suppress(AttributeError):  # another Triton may do without
        interpreter._patch_lang = Once(interpreter._patch_lang)
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
