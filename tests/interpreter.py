"""Triton's interpreter without the half of its work that comes to nothing.

Each call of a device function, of which one program makes hundreds, goes through triton.language
for functions to be replaced by interpreted ones. The kernel's launch has replaced them, and the
function's first call what was left, so later calls find none. And each sum, difference and product
of 32-bit integers is made again in 64 bits for an assertion that the interpreter leaves out.

Triton 3.6's also gets 3.8's way to make a loop's bound of a tensor: its own fails from numpy 2.4 on.
"""

from contextlib import suppress
from dataclasses import replace

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterError, interpreter_builder


def install() -> None:
    first_call, called = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self not in called:
            called.add(self)
            return first_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise InterpreterError(repr(e)) from e

    InterpretedFunction.__call__ = call
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
    with suppress(TypeError):  # another Triton may not have the option
        interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
