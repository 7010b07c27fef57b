"""Which room of the package may import which: data flows one way, as CONTRIBUTING.md has it."""

from __future__ import annotations

import ast
from pathlib import Path

import fedrot
import fedrot_kernels

PACKAGE = Path(fedrot.__file__).parent
MAY = {  # the command line may import them all
    "methods": set(),
    "adapters": {"methods"},
    "tasks": set(),
    "report": set(),
    "simulation": {"adapters", "methods", "tasks"},
    "sweep": {"simulation", "report", "tasks"},
    "bench": {"report"},
    "flower": {"adapters", "methods"},
    "nvflare": {"adapters", "methods"},
}
LATE = {"simulation": {"report"}}  # in a function, when there is something to draw


def imports(folder, within_functions):
    """The modules that those in a folder import."""

    def below(node):
        for child in ast.iter_child_nodes(node):
            if within_functions or not isinstance(child, ast.FunctionDef):
                yield child
                yield from below(child)

    for file in sorted(folder.rglob("*.py")):
        for node in below(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(room, within_functions):
    """The other rooms that a room imports."""
    names = [*imports(PACKAGE / room, within_functions)]
    found = {name.split(".")[1] for name in names if name.startswith("fedrot.")}
    return {name for name in found if (PACKAGE / name).is_dir()} - {room}


def test_no_room_imports_one_above_it():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == {*MAY, "cli"}
    for room, may in MAY.items():
        assert rooms(room, within_functions=False) <= may, room
        assert rooms(room, within_functions=True) <= may | LATE.get(room, set()), room
    assert rooms("cli", within_functions=True) <= {*MAY}


def test_kernels_do_not_import_the_package():
    found = [*imports(Path(fedrot_kernels.__file__).parent, within_functions=True)]
    assert "torch" in found and not [name for name in found if name.split(".")[0] == "fedrot"]
