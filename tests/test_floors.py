"""The house stands: imports go down only, siblings on a floor do not know each other, and some things have one place."""

from __future__ import annotations

import ast
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "harness"
FLOORS = [
    {"errors", "files", "memory", "cgroup", "units", "world", "log", "heartbeat", "above", "shared_memory", "collector"},
    {"config", "formats"},
    {"distributed"},
    {"data", "model", "telemetry", "launch"},
    {"engine", "resilience"},
    {"checkpoint", "generation"},
    {"train", "review", "preflight", "supervise"},
    {"cli", "testing", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _modules():
    for path in sorted(HARNESS.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def _room(path: Path) -> str:
    first = path.relative_to(HARNESS).parts[0]
    return first.removesuffix(".py")


def _imports(tree: ast.AST):
    """Every module that is named, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _rooms_imported(tree: ast.AST):
    for name, line in _imports(tree):
        parts = name.split(".")
        if parts[0] == "harness" and len(parts) > 1 and parts[1] in FLOOR:
            yield parts[1], line


def test_every_room_has_a_floor():
    rooms = {_room(path) for path, _ in _modules()} - {"__init__"}
    assert rooms <= set(FLOOR), rooms - set(FLOOR)


def test_imports_go_down():
    wrong = []
    for path, tree in _modules():
        room = _room(path)
        for other, line in _rooms_imported(tree) if room != "__init__" else ():
            lower = FLOOR[other] < FLOOR[room]
            ground = FLOOR[other] == FLOOR[room] == 0
            main = room == "__main__" and other == "cli"
            if other != room and not lower and not ground and not main:
                wrong.append(f"{path.relative_to(HARNESS)}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_one_file_talks_to_torch_distributed():
    files = {path.relative_to(HARNESS).as_posix() for path, tree in _modules() for name, _ in _imports(tree) if name.startswith("torch.distributed")}
    assert files == {"distributed.py"}


def test_one_caller_of_deepspeed_initialize():
    calls = {
        path.relative_to(HARNESS).as_posix()
        for path, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "initialize" and isinstance(node.value, ast.Name) and node.value.id == "deepspeed"
    }
    assert calls == {"engine/common.py"}


def test_every_module_says_what_it_answers():
    missing = [str(path.relative_to(HARNESS)) for path, tree in _modules() if path.stat().st_size and not ast.get_docstring(tree)]
    assert not missing, missing
