"""Options from YAML and ``key=value`` text into dataclasses, every key, type and range checked.

An option tree is nested dictionaries of plain values. An unknown key is an error that names the
nearest known one. A dataclass field whose metadata has ``kinds`` (name -> class) holds an instance
of one of them: ``name`` chooses the class, the other options are its fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from fedrot.errors import FedrotError

Tree = dict[str, Any]


def option(
    default: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with the range that :func:`build` checks."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    return field(default=default, metadata={**bounds, "choices": choices})


def read_yaml(path: Path) -> Tree:
    """A YAML file of options, nested or with dotted keys."""
    content = load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise FedrotError(f"{path}: must hold keys and values, got {type(content).__name__}")
    try:
        return joined(content)
    except FedrotError as error:
        raise FedrotError(f"{path}: {error}") from error


def joined(content: Mapping[Any, Any]) -> Tree:
    """Options with nested or dotted keys as one tree.

    Raises:
        FedrotError: a key stands there twice, dotted and nested.
    """
    trees = [nested(str(key), value) for key, value in content.items()]
    keys = [key for tree in trees for key in flatten(tree)]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise FedrotError(f"{twice} stands there twice")
    return merge(*trees)


def load_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        FedrotError: it is not valid, or a key stands there twice, of which YAML takes the last.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise FedrotError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Here, before ``<<`` brings in the keys of another mapping."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                problem = f"{key.value} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return node


def parse_overrides(overrides: Iterable[str]) -> Tree:
    """``["local.lr=0.1", "rounds=3"]`` as an option tree; the values are YAML."""
    tree: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise FedrotError(f"{text!r} is not an override; write key=value, as in local.lr=0.1")
        try:
            tree = merge(tree, nested(key.strip(), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise FedrotError(f"{text!r}: the value is not valid YAML") from error
    return tree


def nested(key: str, value: Any) -> Tree:
    """``("a.b", 1)`` as ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(*trees: Tree) -> Tree:
    """Several option trees as one; later values win."""
    out: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(out.get(key), dict) and isinstance(value, dict)
            out[key] = merge(out[key], value) if both else value
    return out


def flatten(tree: Tree, prefix: str = "") -> Tree:
    """The options by dotted key."""
    out: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def first_difference(a: Tree, b: Tree) -> tuple[str, Any, Any] | None:
    """The first dotted key in which two option trees differ, with both values."""
    flat_a, flat_b = flatten(a), flatten(b)
    for key in [*flat_a, *(k for k in flat_b if k not in flat_a)]:
        if flat_a.get(key) != flat_b.get(key):
            return key, flat_a.get(key), flat_b.get(key)
    return None


def build(cls: Any, tree: Any, prefix: str = "") -> Any:
    """An instance of dataclass ``cls`` from an option tree.

    Raises:
        FedrotError: a key is unknown, or a value has the wrong type or range.
    """
    if not isinstance(tree, Mapping):
        raise FedrotError(f"{prefix.rstrip('.') or 'the file'} must hold options, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise _unknown(f"{prefix}{key}", [prefix + name for name in option_keys(cls)])
        values[key] = _value(f"{prefix}{key}", value, hints[key], fields[key])
    try:
        return cls(**values)
    except FedrotError:
        raise
    except ValueError as error:  # a range that the class checks itself
        raise FedrotError(f"{prefix}{error}") from error


def to_tree(config: Any) -> Tree:
    """The option tree from which :func:`build` makes an equal instance."""
    tree: Tree = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not dataclasses.is_dataclass(value):
            tree[f.name] = list(value) if isinstance(value, tuple) else value
        elif kinds := f.metadata.get("kinds"):
            tree[f.name] = {"name": name_of(value, kinds), **to_tree(value)}
        else:
            tree[f.name] = to_tree(value)
    return tree


def option_keys(cls: Any) -> list[str]:
    """Every option of a dataclass by dotted key, those of every kind of a named section too."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, None] = {}  # ordered, without repetition
    for f in dataclasses.fields(cls):
        kinds = f.metadata.get("kinds")
        if kinds:
            keys[f"{f.name}.name"] = None
        inner = [*kinds.values()] if kinds else [hints[f.name]]
        if kinds or dataclasses.is_dataclass(hints[f.name]):
            keys.update((f"{f.name}.{name}", None) for kind in inner for name in option_keys(kind))
        else:
            keys[f.name] = None
    return list(keys)


def name_of(value: Any, kinds: Mapping[str, type]) -> str:
    """The name under which the class of ``value`` is registered."""
    return next(name for name, kind in kinds.items() if type(value) is kind)


def pick(kinds: Mapping[str, Any], name: Any, what: str) -> Any:
    """``kinds[name]``; the error names the nearest that exists."""
    if isinstance(name, str) and name in kinds:
        return kinds[name]
    near = difflib.get_close_matches(str(name), list(kinds), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(kinds)}"
    raise FedrotError(f"unknown {what} {name!r}; {hint}")


def _unknown(key: str, known: list[str]) -> FedrotError:
    # First the same last part: `lr` for `local.lr` is what people write.
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    there = f"known are {', '.join(known)}" if known else f"{key.rpartition('.')[0]} has none"
    hint = f"did you mean {near[0]!r}?" if near else there
    return FedrotError(f"unknown option {key!r}; {hint}")


def _value(key: str, value: Any, hint: Any, f: dataclasses.Field[Any]) -> Any:
    kinds = f.metadata.get("kinds")
    if kinds:
        if not isinstance(value, Mapping):
            raise FedrotError(f"{key} must hold options such as {key}.name, got {value!r}")
        assert f.default_factory is not dataclasses.MISSING
        name = value.get("name", name_of(f.default_factory(), kinds))
        rest = {k: v for k, v in value.items() if k != "name"}
        kind = pick(kinds, name, key)
        for own in rest:
            theirs = [n for n, other in kinds.items() if own in option_keys(other)]
            if theirs and name not in theirs:
                raise FedrotError(
                    f"unknown option '{key}.{own}' of {name}; it is of {', '.join(theirs)}"
                )
        return build(kind, rest, f"{key}.")
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.")
    return _ranged(key, _typed(key, value, hint), f.metadata)


def _typed(key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):  # `int | None`, `float | str`
        hints = typing.get_args(hint)
        if value is None and types.NoneType in hints:
            return None
        first, *others = (t for t in hints if t is not types.NoneType)
        if type(value) in others:
            with contextlib.suppress(FedrotError):  # 1e-2 is text to YAML
                return _typed(key, value, first)
            return value
        hint = first
    if typing.get_origin(hint) is tuple:  # `tuple[int, ...]`, a YAML list
        if not isinstance(value, list | tuple) or not value:
            raise FedrotError(f"{key} must be a list such as [1, 2], got {value!r}")
        return tuple(
            _typed(f"{key}[{i}]", v, typing.get_args(hint)[0]) for i, v in enumerate(value)
        )
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-2 as text, and 3 as an integer
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
        raise FedrotError(f"{key} must be {kind}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise FedrotError(f"{key} must be finite, got {value}")
    return value


def _ranged(key: str, value: Any, rule: Mapping[str, Any]) -> Any:
    if value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_ranged(f"{key}[{i}]", v, rule) for i, v in enumerate(value))
    if rule.get("choices") and value not in rule["choices"]:
        raise FedrotError(f"{key} must be one of {', '.join(rule['choices'])}, got {value!r}")
    for word, holds in (
        ("at_least", lambda bound: value >= bound),
        ("at_most", lambda bound: value <= bound),
        ("above", lambda bound: value > bound),
        ("below", lambda bound: value < bound),
    ):
        bound = rule.get(word)
        if bound is not None and not holds(bound):
            raise FedrotError(f"{key} must be {word.replace('_', ' ')} {bound}, got {value}")
    return value
