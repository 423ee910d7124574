"""The tiny run of the end-to-end tests, for runs on several hosts."""

from tests.end_to_end.conftest import pairs, run_file

__all__ = ["pairs", "run_file"]
