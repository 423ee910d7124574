"""From a YAML file and dotted overrides to a frozen run file in which every value knows where it came from."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from harness.config.elsewhere import NAMES
from harness.config.schema import RunFile
from harness.errors import Refused

SIMILAR = 0.6
"""From which likeness on, as difflib has it, a name may be a slip for another."""
LISTED_PLACES = 3


NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01]+|0x[0-9a-fA-F]+)")


class _Loader(yaml.SafeLoader):
    """YAML in which 010, 12:00:00 and 2024-01-02 are text: it takes them for an octal number, for seconds and for a date."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: (loader.construct_yaml_int if NUMBER.fullmatch(node.value) else loader.construct_yaml_str)(node)
)
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: (loader.construct_yaml_str if ":" in node.value else loader.construct_yaml_float)(node)
)


@dataclass(frozen=True)
class Loaded:
    """A run file with the origin of each value that was set.

    Attributes:
        run: the typed values.
        origins: dotted key -> `FILE:LINE` or `command line`; keys that are absent hold their default.
    """

    run: RunFile
    origins: dict[str, str]

    def origin(self, key: str) -> str:
        """Where `key`, or the nearest section above it, was set."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return "default"


def load(path: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Read, override and validate a run file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` words; the value is read as YAML.

    Raises:
        Refused: one message that lists every unknown key, wrong type and broken rule with its place.
    """
    path = Path(path)
    values, origins = _read(path)
    for word in overrides or []:
        _override(values, origins, word)
    try:
        run = RunFile.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, origins, path) from None
    return Loaded(run, origins)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        raise Refused(f"There is no run file {path}.", where=str(path), remedy="Give the path of a YAML run file; examples stand in launch/runs/.")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
        tree = yaml.compose(text)
    except UnicodeDecodeError as error:
        raise Refused("The run file is not UTF-8.", where=f"{path}, byte {error.start}", remedy="Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise Refused(f"The run file is not valid YAML: {getattr(error, 'problem', error)}.", where=where, remedy="Mend the line.") from None
    if not isinstance(values, dict):
        raise Refused("The run file holds no settings.", where=str(path), remedy="Start with `run_dir:` and the sections data, model, train.")
    origins: dict[str, str] = {}
    _collect_origins(tree, "", path, origins)
    return values, origins


def _collect_origins(node: yaml.Node, prefix: str, path: Path, origins: dict[str, str]) -> None:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in seen:
            raise Refused(f"`{key}` is set twice.", where=f"{path}:{seen[key]} and {path}:{line}", remedy="Keep one of the lines.")
        seen[key] = line
        origins[key] = f"{path}:{line}"
        if isinstance(value_node, yaml.MappingNode):
            _collect_origins(value_node, f"{key}.", path, origins)


def _override(values: dict[str, Any], origins: dict[str, str], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise Refused(f"`{word}` is not an override.", where="command line", remedy="Write it as key.path=value, such as train.steps=100.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise Refused(f"The value of `{key}` is not valid YAML: {text}", where="command line", remedy="Quote it.") from None
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[last] = value
    for stale in [k for k in origins if k.startswith(f"{key}.")]:
        del origins[stale]
    origins[key] = "command line"


def _refusal(error: ValidationError, origins: dict[str, str], path: Path) -> Refused:
    problems, places, remedies = [], [], []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"`{key}` is not a setting.")
            remedies.append(_instead(item["loc"]))
        elif item["type"] == "missing":
            problems.append(f"`{key}` is missing.")
            remedies.append(f"Set `{key}`.")
        else:
            problems.append(f"`{key}`: {item['msg'][0].lower()}{item['msg'][1:]} (it is {item['input']!r}).")
            remedies.append(f"Change `{key}`.")
        places.append(_nearest_origin(key, origins, path))
    return Refused("\n".join(problems), where="; ".join(dict.fromkeys(places)), remedy=" ".join(dict.fromkeys(remedies)))


def _instead(location: tuple[Any, ...]) -> str:
    """What to write for an unknown key: by its name elsewhere, here in another section, or by a name that looks like it."""
    name, siblings = str(location[-1]), _names(location[:-1])
    if told := NAMES.get(name.lower().replace("-", "_")):
        return told
    places = [key for key in _keys() if key.rpartition(".")[2] == name]
    if 0 < len(places) <= LISTED_PLACES:
        return f"Did you mean {' or '.join(f'`{place}`' for place in places)}?"
    if nearest := difflib.get_close_matches(name, siblings, n=1, cutoff=SIMILAR):
        return f"Did you mean `{nearest[0]}`?"
    section = ".".join(map(str, location[:-1]))
    return f"Remove `{name}`; {f'`{section}`' if section else 'a run file'} has {', '.join(siblings)}." if siblings else f"Remove `{name}`."


def _keys(model: type[BaseModel] = RunFile, prefix: str = "") -> list[str]:
    """The dotted names of all sections and settings outside maps."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if (section := _section(field.annotation)) and not _is_map(field.annotation):
            keys += _keys(section, f"{prefix}{name}.")
    return keys


def _nearest_origin(key: str, origins: dict[str, str], path: Path) -> str:
    if key not in origins and (below := [place for name, place in origins.items() if name.startswith(f"{key}.")]):
        return below[0]
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return str(path)


def _names(location: tuple[Any, ...]) -> list[str]:
    """The settings that stand at `location` of the schema."""
    model: type[BaseModel] | None = RunFile
    inside_map = False
    for part in location:
        if inside_map:
            inside_map = False
            continue
        field = model.model_fields.get(str(part)) if model else None
        model = _section(field.annotation) if field else None
        inside_map = field is not None and _is_map(field.annotation)
    return list(model.model_fields) if model else []


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, or of the values of a map of sections."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    candidates = [get_args(c)[1] if get_origin(c) is dict else c for c in candidates]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _is_map(annotation: Any) -> bool:
    return any(get_origin(candidate) is dict for candidate in (annotation, *get_args(annotation)))


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a run file as dotted key -> value."""
    leaves: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            leaves.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, dict) and value and all(isinstance(held, BaseModel) for held in value.values()):
            for key, held in value.items():
                leaves.update(flatten(held, f"{prefix}{name}.{key}."))
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def fixed_keys(model: type[BaseModel] = RunFile, prefix: str = "") -> set[str]:
    """The dotted keys that a resumed run must keep; `*` stands for any name in a map of sections."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("resume") == "fixed":
            keys.add(f"{prefix}{name}")
        if section := _section(field.annotation):
            keys |= fixed_keys(section, f"{prefix}{name}.{'*.' if _is_map(field.annotation) else ''}")
    return keys
