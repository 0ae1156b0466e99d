"""Triton's interpreter at three times its speed.

It replaces the functions of `triton.language` anew for each call of a function in a kernel, on top of the replacements
that are there, and looks for overflow in each sum of integers. In a process for these tests it needs to do so once, and
not at all.
"""

from __future__ import annotations

from typing import Any


def hasten() -> None:
    """Makes the replacements once for this process, for good."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace: Any = interpreter._patch_lang
    done: set[tuple[bool, bool]] = set()

    def once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        which = (tl in seen, tl.core in seen)
        if which not in done:
            done.add(which)
            replace(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
