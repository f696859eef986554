"""Triton's interpreter in half the time.

It remaps `triton.language` to itself at each launch, and once more at each call from one jitted function to another: by
then it is, and looking through the language again takes most of the call. Here it is done at the first call of each
function in a launch. Triton 3.9 is as this expects; another one is left as it is, if it is not.
"""

import functools

from triton.runtime import interpreter


class Nothing:
    """A scope of no changes."""

    def restore(self):
        pass


def remap_once_per_launch() -> None:
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(interpreter._patch_lang, "__wrapped__"):
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
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = remap_once, launch_anew
