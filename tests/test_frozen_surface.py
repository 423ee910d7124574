"""Verbs, flags and settings are a snapshot: growing them is a deliberate change of tests/surface.txt.

`UPDATE_SURFACE=1 bash tests/run.sh tests/test_frozen_surface.py` writes it anew.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from harness.cli.main import build_parser
from harness.config.load import _is_map, _section, fixed_keys
from harness.config.schema import RunFile

SNAPSHOT = Path(__file__).with_name("surface.txt")


def _flags(parser: argparse.ArgumentParser, prefix: str):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield f"{prefix} {name}"
                yield from _flags(child, f"{prefix} {name}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"{prefix} {' '.join(action.option_strings) or action.dest}"


def _settings(model: type, prefix: str = ""):
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from _settings(section, f"{prefix}{name}.{'*.' if _is_map(field.annotation) else ''}")
        else:
            default = "required" if field.is_required() else repr(field.default)
            yield f"{prefix}{name} = {default} ({'fixed' if f'{prefix}{name}' in fixed_keys() else 'free'})"


def test_surface():
    surface = "\n".join([*_flags(build_parser(), "harness"), "", *_settings(RunFile)]) + "\n"
    if os.environ.get("UPDATE_SURFACE"):
        SNAPSHOT.write_text(surface)
    assert surface == SNAPSHOT.read_text()
