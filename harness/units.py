"""Numbers as people read them: bytes, seconds, counts."""

from __future__ import annotations

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    value = float(count)
    for unit in _BINARY:
        if abs(value) < 1024 or unit == _BINARY[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """`0.25` -> `0.25 s`, `75` -> `1:15`, `4000` -> `1:06:40`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(count: float) -> str:
    """`1234` -> `1,234`, `12345678` -> `12.3 M`."""
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e7, "M")):
        if abs(count) >= bound:
            return f"{count / (1e6 if unit == 'M' else bound):.1f} {unit}"
    return f"{int(count):,}" if float(count).is_integer() else f"{count:,.1f}"
