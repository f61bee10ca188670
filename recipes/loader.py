"""From a name or a file to a checked `Recipe`; every mistake is named with its place and the way out."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.schema import Recipe

FOLDER = Path(__file__).resolve().parent


class RecipeError(ValueError):
    """A recipe that cannot be run: names the file, each key that is wrong, and what is allowed."""


def names() -> list[str]:
    """The recipes that ship: the folder is the catalog."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read recipe `name` (or a path to a .yaml file) with `section.key=value` overrides applied."""
    file = _find(name)
    return parse({"name": file.stem, **_read(file)}, overrides, str(file))


def parse(content: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """A recipe from its content, with overrides applied; `where` is told in an error."""
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_explain(detail)}" for detail in error.errors()]
        raise RecipeError(f"{where}: the recipe is not valid\n" + "\n".join(lines)) from None


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(f"no such recipe file: {name}")
        return Path(name)
    if name not in names():
        raise RecipeError(
            f"no such recipe: {name!r}{_nearest(name, names())}; there are: {', '.join(names())}"
        )
    return FOLDER / f"{name}.yaml"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of sections (task:, model:, data: …)")
    return content


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # PyYAML leaves Python's own
            raise yaml.YAMLError(
                f"{node.value!r} at line {node.start_mark.line + 1}: {error}; put quotes around a text that "
                "looks like a date"
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)
        if len(own) != len(set(own)):
            raise yaml.YAMLError(f"a key stands twice in the mapping at line {node.start_mark.line + 1}")
        return mapping


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: write section.key=value, for example --set qat.epochs=2")
    *parents, last = key.split(".")
    for parent in parents:
        section = content.get(parent) or {}
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a value, not a section")
        content[parent] = dict(section)  # its own: an anchor may have given two keys the same
        content = content[parent]
    try:
        content[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def _explain(detail: ErrorDetails) -> str:
    """One mistake: `section.key: what was wrong (what is allowed)`."""
    where = ".".join(str(part) for part in detail["loc"]) or "recipe"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        allowed = _fields(detail["loc"][:-1])
        return (
            f"{where}: unknown key{_nearest(str(detail['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
        )
    if detail["type"] == "literal_error":
        expected = [part.strip(" '") for part in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{where}: {detail['input']!r} is not one of {', '.join(expected)}" + _nearest(
            str(detail["input"]), expected
        )
    if detail["type"] == "string_pattern_mismatch" and where.endswith("source"):
        weights = ", python:<module>:<function>, modelopt:<folder>" if where == "model.source" else ""
        return (
            f"{where}: {detail['input']!r} is no source; write hub:<id>, path:<file or folder>, "
            f"package:<distribution>/<file suffix>{weights}"
        )
    if detail["type"] == "missing":
        return f"{where}: this key is required"
    return f"{where}: {message}, got {detail['input']!r}" if detail["loc"] else f"{where}: {message}"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `loc` knows."""
    section: type[BaseModel] = Recipe
    for part in loc:
        field = section.model_fields.get(str(part))
        if field is None:  # pydantic names the member of a union (`Label`) in the location, too
            continue
        annotation = field.annotation
        members = [annotation, *typing.get_args(annotation)]
        models = [item for item in members if isinstance(item, type) and issubclass(item, BaseModel)]
        section = models[0] if models else section
    return [name for name in section.model_fields if name != "name" or section is not Recipe]


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
