"""Real text that every Python installation carries: the language reference, and questions about the standard library."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from functools import cache

SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "test", "turtledemo", "tkinter", "turtle", "msilib", "ensurepip", "__main__"}
LONGEST_DOCUMENT = 4000


@cache
def python_prose() -> list[str]:
    """The topics of the language reference that ship as `pydoc_data`, cut at paragraphs into documents of some 4,000 characters."""
    from pydoc_data import topics

    documents = []
    for name in sorted(topics.topics):
        documents += cut_at_paragraphs(topics.topics[name], LONGEST_DOCUMENT)
    return documents


def cut_at_paragraphs(text: str, longest: int) -> list[str]:
    """Consecutive paragraphs joined up to `longest` characters; a longer paragraph stays whole."""
    documents: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if current and len(joined) > longest:
            documents.append(current)
            joined = paragraph
        current = joined
    return [*documents, current] if current else documents


@cache
def python_questions() -> list[tuple[str, str]]:
    """("What does `shutil.copytree` do?", first paragraph of its docstring) for the public functions and classes of the library."""
    pairs: dict[str, str] = {}
    with warnings.catch_warnings():  # some modules and members warn that they are deprecated
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names):
            if name.startswith("_") or name in SKIPPED:
                continue
            for module in _modules(name):
                for member, value in sorted(vars(module).items(), key=lambda item: item[0]):
                    _ask(pairs, module.__name__, member, value)
    return sorted(pairs.items())


def _modules(name: str) -> list[object]:
    try:
        found = [importlib.import_module(name)]
    except Exception:  # a module of another platform
        return []
    for info in pkgutil.iter_modules(getattr(found[0], "__path__", [])):
        if not info.name.startswith("_") and info.name not in SKIPPED | {"tests", "windows_utils", "windows_events"}:
            try:
                found.append(importlib.import_module(f"{name}.{info.name}"))
            except Exception:
                continue
    return found


def _ask(pairs: dict[str, str], module: str, name: str, value: object) -> None:
    if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)) or getattr(value, "__module__", None) != module:
        return
    _add(pairs, f"{module}.{name}", value)
    if inspect.isclass(value):
        for method, function in sorted(vars(value).items()):
            if not method.startswith("_") and inspect.isroutine(function):
                _add(pairs, f"{module}.{name}.{method}", function)


def _add(pairs: dict[str, str], path: str, value: object) -> None:
    text = inspect.cleandoc(value.__doc__) if isinstance(getattr(value, "__doc__", None), str) else ""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip() and not re.match(r"^[\w.]+\(.*\)", p.strip())]
    answer = " ".join(paragraphs[0].split()) if paragraphs else ""
    if 20 <= len(answer) <= 600 and " at 0x" not in answer:
        pairs[f"What does `{path}` do?"] = answer
