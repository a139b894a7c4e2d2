"""Triton's interpreter without the half of its work that comes to nothing.

Each call of a device function, of which one program makes hundreds, goes through triton.language
for functions to be replaced by interpreted ones. The kernel's launch has replaced them, and the
function's first call what was left, so later calls find none. And each sum, difference and product
of 32-bit integers is made again in 64 bits for an assertion that the interpreter leaves out.

Triton 3.6's also gets 3.8's way to make a loop's bound of a tensor: its own fails from numpy 2.4.
"""

from dataclasses import replace

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterError, interpreter_builder

TRITONS_CALL = InterpretedFunction.__call__
TRITONS_OPTIONS = interpreter_builder.options


def install() -> None:
    called, patch_tensor = set(), interpreter._patch_lang_tensor

    def call(self, *args, **kwargs):
        if self not in called:
            called.add(self)
            return TRITONS_CALL(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise InterpreterError(repr(e)) from e

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    InterpretedFunction.__call__ = call
    interpreter._patch_lang_tensor = patch
    interpreter_builder.options = replace(TRITONS_OPTIONS, sanitize_overflow=False)
