"""Chat templates that write today's date: the day is a setting, so that a run file gives the same shards tomorrow."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from harness.errors import Refused

TODAY = "strftime_now("
CALL = re.compile(r"strftime_now\(\s*(['\"])((?:(?!\1).)*)\1\s*\)")


def pin(tokenizer: Any, day: date | None, *, where: str) -> None:
    """Write the day into the chat templates of a tokenizer that ask for today's; generation and exports then see what training saw.

    Args:
        tokenizer: of transformers.
        day: as set.
        where: the tokenizer was named, for messages.

    Raises:
        Refused: when no day is set, or a template asks for it in a way that cannot be replaced.
    """
    given = tokenizer.chat_template or {}
    sources = {"": given} if isinstance(given, str) else given
    if not any(TODAY in source for source in sources.values()):
        return
    if day is None:
        raise Refused("The tokenizer's chat template writes today's date, so that tomorrow the same run file would give other shards.", where=f"{where} (chat template)",
                      remedy=f"Set `data.date` to the day that it shall write, such as data.date={date.today().isoformat()}.")
    written = {name: CALL.sub(lambda call: f"{call[1]}{day.strftime(call[2])}{call[1]}", source) for name, source in sources.items()}
    if any(TODAY in source for source in written.values()):
        raise Refused("The tokenizer's chat template asks for today's date in a format that is not a plain string.", where=f"{where} (chat template)",
                      remedy="Write the date into a copy of its chat_template.")
    tokenizer.chat_template = written[""] if isinstance(given, str) else written


def are_open(folder: Path) -> bool:
    """Whether a chat template in the folder of a tokenizer asks for today's date."""
    return any(TODAY in path.read_text(encoding="utf-8") for path in folder.glob("**/*.jinja"))
