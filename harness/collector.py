"""How often Python looks for cycles of objects: libraries make a million objects that all stay, and looking through them again and again is slow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
SELDOM = (50_000, 20, 100)


def seldom() -> None:
    """While libraries load, which takes a quarter longer otherwise."""
    gc.set_threshold(*SELDOM)


def as_usual() -> None:
    """Once they are loaded: as often as Python does, so that no cycle keeps a tensor for long, but not among what is there by now."""
    gc.freeze()
    gc.set_threshold(*USUAL)


def leave() -> None:
    """Before the process ends: the interpreter would look through everything several times."""
    gc.freeze()


@contextmanager
def off() -> Iterator[None]:
    """Not at all, while what is made has no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
