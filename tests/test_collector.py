"""Cycles are found as usual once libraries are loaded, and those of before are left alone."""

from __future__ import annotations

import gc
import weakref

from harness import collector


class Cycle:
    def __init__(self):
        self.itself = self


def test_off_is_off_until_the_outermost_ends():
    with collector.off():
        with collector.off():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_loaded_is_left_alone_and_later_cycles_are_found():
    frozen = gc.get_freeze_count()
    try:
        collector.seldom()
        assert gc.get_threshold() == collector.SELDOM
        before = Cycle()
        gone = weakref.ref(before)
        del before
        collector.as_usual()
        later = weakref.ref(Cycle())
        made = [[] for _ in range(2 * collector.USUAL[0])]
        assert later() is None and gone() is not None and len(made)
        assert gc.get_threshold() == collector.USUAL and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
    gc.collect()
    assert gone() is None
