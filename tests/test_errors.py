"""What a message of ours says of another's error."""

from __future__ import annotations

import pytest

from harness.errors import first_line


@pytest.mark.parametrize("error, said", [
    (ValueError("\n first\nsecond"), "first"), (AssertionError(), "AssertionError"), (KeyError(" "), "' '"), (OSError("x" * 999), "x" * 300),
])
def test_the_first_line(error, said):
    assert first_line(error) == said
