"""The user's own code as one digest: a module, and the modules of theirs that it imports, however deep."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
from pathlib import Path

from tasks import stage, store
from tasks.errors import InputError

SCHEMA = Path(__file__).resolve().parent.parent / "recipes" / "__init__.py"


def digest(name: str) -> str:
    """sha256 over the module's source and that of what it imports from its package or from beside it.

    Of an installed module only its own file counts, and neither do the recipes' schema and loader.
    """
    root = _module(name)
    top = root.parents[name.count(".") + (root.name == "__init__.py")]
    installed = any(
        root.is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")
    )
    seen, waiting = set[Path](), [root]
    while waiting:
        current = waiting.pop()
        if current not in seen and (current == root or current.resolve() not in stage.sources(SCHEMA)):
            seen.add(current)
            waiting += [] if installed or current.suffix != ".py" else _imports(current, top)
    lines = sorted(f"{store.file_digest(file)}  {file.relative_to(top).as_posix()}\n" for file in seen)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _module(name: str) -> Path:
    """The module's file, found without importing it; its packages are imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise InputError(f"python:{name}: no module {name} here")
    return Path(spec.origin).absolute()


def _imports(file: Path, top: Path) -> list[Path]:
    """The files below `top`, or beside the module for a relative import, that its import statements name."""
    places: list[Path] = []
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except SyntaxError as problem:
        raise InputError(f"{file}: not Python: {problem}") from problem
    for node in nodes:
        if isinstance(node, ast.Import):
            places += [top.joinpath(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else top
            package = start.joinpath(*(node.module or "").split("."))
            places += [package, *(package / alias.name for alias in node.names)]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in files if file.is_file() and file.is_relative_to(top)]
