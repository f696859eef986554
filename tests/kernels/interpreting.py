"""Triton's interpreter in a third of the time.

It remaps `triton.language` to itself at each launch, and once more at each call from one jitted function to another: by
then it is, and looking through the language again takes most of the call. Here it is done at the first call of each
function in a launch. Types of numbers are looked up in a table that is made once. Whether integers leave their type is
not computed where nobody looks at it, which is unless `debug` is set. Coverage is not measured within launches, as
tracing doubles their time; pyproject.toml leaves kernels out of what is counted. Triton 3.9 is as this expects; a
version that lacks one of the names is left as it is.
"""

import dataclasses
import functools
import sys

import triton.language as tl
from triton.runtime import interpreter

NAMES = "_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder"


class Nothing:
    """A scope of no changes."""

    def restore(self):
        pass


def hurry() -> None:
    if hasattr(interpreter.GridExecutor.__call__, "__wrapped__") or not all(
        hasattr(interpreter, name) for name in NAMES
    ):
        return
    remap, launch, remapped = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.wraps(remap)
    def remap_once(function):
        if function in remapped:
            return Nothing()
        remapped.add(function)
        return remap(function)

    @functools.wraps(launch)
    def launch_anew(self, *args, **kwargs):
        remapped.clear()  # the last launch has undone what it did
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return launch(self, *args, **kwargs)
        finally:
            sys.settrace(trace)

    every_dtype, of_scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    @functools.wraps(every_dtype)
    def dtype_of(kind):
        scalar = kind.element_ty if type(kind) is tl.block_type else kind
        return of_scalar(scalar) if type(scalar) is tl.dtype else every_dtype(kind)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = remap_once, launch_anew
    interpreter._get_np_dtype = dtype_of
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
