"""Attributes that are found when first asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class lazy(cached_property[T]):  # noqa: N801 (a decorator)
    """`functools.cached_property` as it is since Python 3.12, without a lock.

    That of 3.11 holds one lock for all objects of a class while it finds a value: whoever waits for a shard of one set
    would keep the rows of every other set from being read (https://github.com/python/cpython/issues/87634).
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self.attrname not in instance.__dict__:
            instance.__dict__[self.attrname] = self.func(instance)
        return instance.__dict__[self.attrname]
