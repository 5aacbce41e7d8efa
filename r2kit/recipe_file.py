"""From YAML and ``key.path=value`` overrides to a `Recipe`, with every problem named by file, line and key.

YAML is read the 1.2 way (``1e-3`` is a number, ``no`` is a word, a key twice is an error) by ruamel.yaml's safe loader,
which builds plain values only.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from r2kit.errors import RecipeError, did_you_mean
from r2kit.recipe import Recipe

KeyPath = tuple[str, ...]


@dataclass
class _Draft:
    """The plain values of a recipe before checking, and where each key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    origin: str = "recipe"

    def place(self, path: KeyPath) -> str:
        """Return ``file:line`` of the key, of its nearest written parent, or the recipe's origin."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.origin


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A file, the name of a packaged recipe such as ``satellite``, nested plain values, or a `Recipe`.
        overrides: ``key.path=value`` items; the value is read as YAML.

    Raises:
        RecipeError: With every problem found, one line each.
    """
    draft = _read(source)
    problems = _apply_overrides(draft, overrides)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(draft.values)
    except ValidationError as error:
        problems += _explain(error, draft)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with r2kit: name -> file."""
    inside = Path(__file__).parent / "_recipes"  # in a wheel
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given as a path or as the name of a packaged one.

    Raises:
        RecipeError: If there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if str(name) in packaged:
        return packaged[str(name)]
    hint = did_you_mean(path.stem, packaged) or f"; packaged recipes are: {', '.join(packaged)}"
    what = "is a folder, not a recipe file" if path.is_dir() else "is neither a file nor a packaged recipe"
    raise RecipeError(f"{name}: {what}{hint}")


def to_yaml(recipe: Recipe) -> str:
    """Return the fully resolved recipe as YAML, defaults included."""
    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def to_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "r2kit recipe"
    return schema


def new_recipe(task: str = "classification") -> str:
    """Return a starting point: every section, and in it every key with its meaning and default, commented out.

    Args:
        task: The kind of task.

    Raises:
        RecipeError: If there is no such kind.
    """
    kinds = _members(Recipe.model_fields["task"])
    if task not in kinds:
        raise RecipeError(f"task: got {task}, allowed is one of {', '.join(kinds)}{did_you_mean(task, kinds)}")
    head = (
        "# A recipe states only what differs from the defaults: take the # away from a line to change it.\n"
        "#   r2kit recipe check FILE        is it right?\n"
        "#   r2kit finetune FILE --dry-run  everything up to the first two steps\n"
    )
    return head + "\n".join(_commented(Recipe.model_validate({"task": {"kind": task}}), 0)) + "\n"


@dataclass(frozen=True)
class KeyRow:
    """One key of a recipe in words.

    Attributes:
        section: The part that it belongs to, as a key path; of the task with the kind that has it: `task: detection`.
        about: What that part is.
        key: The whole ``key.path``.
        allowed: What it accepts.
        default: As YAML writes it.
        meaning: What it does.
    """

    section: str
    about: str
    key: str
    allowed: str
    default: str
    meaning: str


def key_rows(spec: type[BaseModel] = Recipe, prefix: str = "", kind: str = "") -> Iterator[KeyRow]:
    """Yield every key that a recipe can hold, its section's own keys first: what the reference of the keys is made of.

    Args:
        spec: A part of the recipe.
        prefix: Key path of that part, with a dot at its end.
        kind: The word that chose this member of a union.
    """
    section = prefix.rstrip(".") + (f": {kind}" if kind else "")
    about = (spec.__doc__ or "").splitlines()[0]
    inner: list[tuple[type[BaseModel], str, str]] = []
    for name, info in spec.model_fields.items():
        below = _model_of(info)
        if below is None:
            meaning = " ".join((info.description or "").split())
            default = _show(info.get_default())
            yield KeyRow(section, about, f"{prefix}{name}", _allowed(info), default, meaning)
        elif members := _members(info):
            inner += [(member, f"{prefix}{name}.", word) for word, member in members.items()]
        else:
            inner.append((below, f"{prefix}{name}.", kind))
    for below, path, word in inner:
        yield from key_rows(below, path, word)


def _commented(spec: BaseModel, depth: int) -> Iterator[str]:
    """Yield the lines of `new_recipe` for one part of the recipe."""
    pad = "  " * depth
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, BaseModel):
            yield f"\n{pad}{name}:  # {(type(value).__doc__ or '').splitlines()[0]}"
            if info.discriminator is not None and not isinstance(value, type(info.default)):
                yield f"{pad}  {info.discriminator}: {getattr(value, str(info.discriminator))}"
            yield from _commented(value, depth + 1)
        else:
            yield f"{pad}#   {' '.join((info.description or '').split())}  [{_allowed(info)}]"
            yield f"{pad}# {name}: {_show(value)}"


# ---------------------------------------------------------------------------------------------------- reading


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _read(source: str | Path | dict[str, Any] | Recipe) -> _Draft:
    """Return the plain values and the line of every key."""
    if isinstance(source, Recipe):
        return _Draft(source.model_dump())
    if isinstance(source, dict):
        return _Draft(_copy(source))
    path = find_recipe(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = _yaml().load(text)
        node = _yaml().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {_first_line(error.problem or error.context)}") from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path}:1: not valid YAML: {_first_line(str(error))}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys such as 'data:', this file holds {_kind(values)}")
    draft = _Draft(_without_empty_sections(values, Recipe), {}, str(path))
    for key_path, line in _lines(node, ()):
        draft.places[key_path] = f"{path}:{line}"
    if "name" not in values and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
        draft.values = {"name": path.stem, **draft.values}
    return draft


def _lines(node: Node | None, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Yield the key path and 1-based line of every key below a mapping node."""
    if not isinstance(node, MappingNode):
        return
    for key, value in node.value:
        if isinstance(key, ScalarNode):
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _lines(value, path)


def _without_empty_sections(values: dict[str, Any], spec: type[BaseModel]) -> dict[str, Any]:
    """Drop sections with nothing below them (``data:`` alone), which YAML reads as null."""
    kept = {}
    for key, value in values.items():
        inner = _model_of(spec.model_fields[key], value) if key in spec.model_fields else None
        if inner is not None and isinstance(value, dict):
            kept[key] = _without_empty_sections(value, inner)
        elif inner is None or value is not None:
            kept[key] = value
    return kept


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _apply_overrides(draft: _Draft, overrides: Sequence[str]) -> list[str]:
    """Write ``key.path=value`` items into the draft and return the problems."""
    problems: list[str] = []
    # What chooses a member of a union comes first, because it decides which keys there are beside it.
    for item in sorted(overrides, key=lambda item: not item.partition("=")[0].strip().endswith(".kind")):
        key, separator, text = item.partition("=")
        if not separator or not key:
            problems.append(f"command line: '{item}': overrides are written key.path=value, e.g. train.epochs=3")
            continue
        path = tuple(key.strip().split("."))
        fault = _unknown_key(path, draft.values)
        if fault:
            problems.append(f"command line: {key}: {fault}")
            continue
        try:
            value = _yaml().load(text) if text.strip() else None
        except YAMLError as error:
            problems.append(f"command line: {key}: '{text}' is not valid YAML: {_first_line(str(error))}")
            continue
        parent = draft.values
        for part in path[:-1]:
            if not isinstance(parent.get(part), dict):
                parent[part] = {}
            parent = parent[part]
        parent[path[-1]] = value
        draft.places[path] = "command line"
    return problems


# ----------------------------------------------------------------------------------------------------- errors


def all_keys(spec: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every ``key.path`` that a recipe can hold."""
    for name, info in spec.model_fields.items():
        inner = _model_of(info)
        if inner is not None:
            members = _members(info).values() or [inner]
            yield from dict.fromkeys(key for member in members for key in all_keys(member, f"{prefix}{name}."))
        else:
            yield f"{prefix}{name}"


def _model_of(info: FieldInfo, value: Any = None) -> type[BaseModel] | None:
    """Return the model below a key; of a union the member that the value's `kind` chooses, else the default one."""
    annotation = info.annotation
    members = _members(info)
    if members:
        kind = value.get(str(info.discriminator)) if isinstance(value, dict) else None
        return members.get(kind, type(info.default)) if isinstance(kind, str) else type(info.default)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _members(info: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the members of a union by the word that chooses each; nothing for any other key."""
    if info.discriminator is None:
        return {}
    chosen = str(info.discriminator)
    return {member.model_fields[chosen].default: member for member in typing.get_args(info.annotation)}


def _unknown_key(path: KeyPath, values: Any) -> str | None:
    """Return what is wrong with a key path beside the values so far, or None when the schema has it."""
    spec: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if spec is None:
            return f"'{'.'.join(path[:depth])}' holds one value and has no keys below it"
        if part not in spec.model_fields:
            return f"unknown key{_near_key(path[: depth + 1], spec)}"
        values = values.get(part) if isinstance(values, dict) else None
        spec = _model_of(spec.model_fields[part], values)
    return None


def _near_key(path: KeyPath, spec: type[BaseModel]) -> str:
    """Return the nearest allowed key: among the siblings, else anywhere in the recipe by its last part."""
    *parents, last = path
    siblings = did_you_mean(last, spec.model_fields)
    if siblings:
        prefix = ".".join(parents)
        return siblings.replace("'", f"'{prefix}.", 1) if prefix else siblings
    owner = _owner(path)
    if owner:
        return owner
    by_last: dict[str, str] = {}
    for key in all_keys():
        by_last.setdefault(key.rsplit(".", 1)[-1], key)
    if last in by_last:
        return f"; did you mean '{by_last[last]}'?"
    return f"; allowed here: {', '.join(spec.model_fields)}"


def _owner(path: KeyPath) -> str:
    """Return which member of a union has the key that another one lacks; an empty string where none has it."""
    spec: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if spec is None or part not in spec.model_fields:
            return ""
        info = spec.model_fields[part]
        for kind, member in _members(info).items():
            if ".".join(path[depth + 1 :]) in all_keys(member):
                return f"; {'.'.join(path[: depth + 1])}.{info.discriminator}={kind} has it"
        spec = _model_of(info)
    return ""


def _explain(error: ValidationError, draft: _Draft) -> list[str]:
    """Return one line for each key that pydantic refused."""
    lines: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        path, info, spec = _follow(tuple(detail["loc"]), draft.values)
        if detail["type"] == "union_tag_invalid" and info is not None:
            path, kinds = (*path, str(info.discriminator)), list(_members(info))
            info = None
            came = _value_at(draft.values, path)
            hint = did_you_mean(came, kinds) if isinstance(came, str) else ""
            detail["msg"] = f"got {_show(came)} ({_kind(came)}), allowed is one of {', '.join(kinds)}{hint}"
        dotted = ".".join(path)
        where = draft.place(path)
        if detail["type"] == "extra_forbidden":
            unknown = (*path, str(detail["loc"][-1]))
            lines[unknown] = f"{draft.place(unknown)}: {'.'.join(unknown)}: unknown key{_near_key(unknown, spec)}"
        elif detail["type"] == "value_error":
            key, _, message = str(detail["ctx"]["error"]).partition(": ")
            at = (*path, *key.split("."))
            lines[at] = f"{draft.place(at)}: {'.'.join(at)}: {message}"
        elif info is not None and path not in lines:
            came = _value_at(draft.values, path)
            inner = _model_of(info, came)
            allowed = f"keys below it ({', '.join(inner.model_fields)})" if inner is not None else _allowed(info)
            hint = did_you_mean(came, _choices(info)) if isinstance(came, str) else ""
            lines[path] = f"{where}: {dotted}: got {_show(came)} ({_kind(came)}), allowed is {allowed}{hint}"
        elif path not in lines:
            lines[path] = f"{where}: {dotted or 'recipe'}: {detail['msg']}"
    return list(lines.values())


def _follow(loc: tuple[int | str, ...], values: Any) -> tuple[KeyPath, FieldInfo | None, type[BaseModel]]:
    """Walk a pydantic location as far as it names keys of the recipe; what follows are members of a union."""
    spec: type[BaseModel] = Recipe
    info: FieldInfo | None = None
    path: list[str] = []
    for part in loc:
        if info is not None and part in _members(info):
            continue  # pydantic names the chosen member of a union after the key
        if part not in spec.model_fields or not isinstance(part, str):
            break
        info = spec.model_fields[part]
        path.append(part)
        inner = _model_of(info, _value_at(values, tuple(path)))
        if inner is None:
            break
        spec = inner
    return tuple(path), info, spec


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values


def _choices(info: FieldInfo) -> list[str]:
    """Return the words a field allows, through unions."""
    found: list[str] = []
    todo = [info.annotation]
    while todo:
        annotation = todo.pop()
        if typing.get_origin(annotation) is typing.Literal:
            found += [str(choice) for choice in typing.get_args(annotation)]
        else:
            todo += list(typing.get_args(annotation))
    return found


def _allowed(info: FieldInfo) -> str:
    """Return in words what a field accepts."""
    annotation = info.annotation
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if typing.get_origin(annotation) is typing.Union:
        members = typing.get_args(annotation)
    return " or ".join(dict.fromkeys(_member(member, tuple(info.metadata)) for member in members))


def _member(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Return in words what one member of a union accepts."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        flat: list[Any] = []
        for item in extra:
            flat += item.metadata if isinstance(item, FieldInfo) else [item]
        return _member(inner, tuple(flat))
    if annotation is types.NoneType:
        return "null"
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        items = [item for item in typing.get_args(annotation) if item is not Ellipsis]
        either = typing.get_origin(items[0]) in (typing.Union, types.UnionType)
        each = typing.get_args(items[0]) if either else (items[0],)
        count = "" if Ellipsis in typing.get_args(annotation) else f" of {len(items)}"
        return f"a list{count}, each {' or '.join(_member(one) for one in each)}"
    word = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(annotation, "a value")
    bounds = []
    for item in metadata:
        for attribute, phrase in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            bound = getattr(item, attribute, None)
            if bound is not None:
                bounds.append(f"{phrase} {bound:g}" if isinstance(bound, float) else f"{phrase} {bound}")
        pattern = getattr(item, "pattern", None)
        if pattern is not None:
            bounds.append(f"matching {pattern}")
    return f"{word} {' and '.join(bounds)}".strip()


def _kind(value: Any) -> str:
    """Return the YAML name of a value's type."""
    kinds = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "keys"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """Return a value as YAML would write it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(_show(item) for item in value)}]"
        return text if len(text) <= 60 else text[:57] + "..."
    text = repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(text: str | None) -> str:
    return (text or "unreadable").strip().splitlines()[0]
