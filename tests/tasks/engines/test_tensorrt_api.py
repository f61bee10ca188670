"""Every TensorRT name in the code exists in each version it is used with; nothing heavy is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.engines import tensorrt_api as api

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "tasks" / "engines").glob("tensorrt*.py"))
LISTINGS = ROOT / "tests" / "fixtures" / "tensorrt-api"
ALL = ("tensorrt-8.6", "tensorrt-11.4", "tensorrt_rtx-1.7")
NEW = ("tensorrt-11.4", "tensorrt_rtx-1.7")
ONLY_NEW = {"_special_refit", "_same_capability", "_mark", "_give_onnx", "_serialized_10"}
CLASSES = {  # what a variable or attribute of this name holds
    "refitter": "Refitter",
    "engine": "ICudaEngine",
    "runtime": "Runtime",
    "network": "INetworkDefinition",
    "parser": "OnnxParserRefitter",
    "inspector": "EngineInspector",
    "_context": "IExecutionContext",
}


def listing(version: str) -> dict[str, set[str]]:
    """Members by class or enum; functions under ""."""
    found: dict[str, set[str]] = {"": set()}
    current = ""
    for line in (LISTINGS / f"{version}.txt").read_text().splitlines():
        if line.startswith("enum "):
            name, members = line[5:].split(": ")
            found[name] = set(members.split(", "))
        elif line.startswith("class "):
            current = line[6:].strip()
            found[current] = set()
        elif line.startswith("def "):
            found[""].add(line[4:].strip())
        elif line.startswith("    "):
            found[current].add(line.strip().split("(")[0].split(" ")[0])
    return found


def chain(node: ast.AST) -> list[str]:
    """`held.trt.Runtime` as its names."""
    if isinstance(node, ast.Attribute):
        return [*chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def uses() -> Iterator[tuple[str, str, str, str]]:
    """(file, enclosing function, class or "", member) of every TensorRT name in the sources."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute):
                    yield from ((path.name, function.name, *use) for use in _of(chain(node), function.name))


def _of(names: list[str], function: str) -> Iterator[tuple[str, str]]:
    classes = dict(CLASSES)
    if function.startswith("_serialized"):
        classes["config"] = "ISerializationConfig"
    elif function == "_special_refit":
        classes["config"] = "IBuilderConfig"
    if "trt" in names[:-1]:
        rest = names[names.index("trt") + 1 :]
        yield rest[0], rest[1] if len(rest) > 1 else ""
    elif len(names) > 1 and names[-2] in classes and names != ["job", "runtime"]:
        yield classes[names[-2]], names[-1]


def test_the_code_uses_tensorrt_at_all() -> None:
    found = {(kind, member) for _, _, kind, member in uses()}
    assert {("Refitter", ""), ("Refitter", "set_named_weights"), ("BuilderFlag", "REFIT_IDENTICAL")} <= found
    assert len(found) > 30


@pytest.mark.parametrize("version", ALL)
def test_every_name_exists(version: str) -> None:
    names = listing(version)
    missing = [
        f"{file} {function}: {kind}.{member}"
        for file, function, kind, member in uses()
        if (version in NEW or function not in ONLY_NEW)
        and (kind not in names or (member and member not in names[kind]))
    ]
    assert not missing


def test_what_only_new_versions_have_is_kept_apart() -> None:
    """Without the separation the test above would fail on 8.6: so it can fail."""
    names = listing("tensorrt-8.6")
    assert "REFIT_IDENTICAL" not in names["BuilderFlag"]
    assert "OnnxParserRefitter" not in names
    assert "SerializationFlag" not in names


def test_imports_with_numpy_onnx_and_polygraphy_alone() -> None:
    """And its syntax is CPython 3.10's."""
    for path in SOURCES:
        ast.parse(path.read_text(), feature_version=(3, 10))
    code = (
        "import sys\n"
        "for name in ('torch', 'pydantic', 'prefect', 'mlflow', 'scipy', 'transformers', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "import tasks.engines.tensorrt, tasks.engines.tensorrt_build\n"
        "assert 'tensorrt' not in sys.modules and 'tensorrt_rtx' not in sys.modules\n"
        "assert 'polygraphy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_version_numbers() -> None:
    assert api.numbers("8.6.0.post1") == (8, 6, 0, 1)
    assert api.weakly_typed("tensorrt", "8.6.0")
    assert not api.weakly_typed("tensorrt", "10.0.1")
    assert not api.weakly_typed("tensorrt_rtx", "1.7.1.116")
    assert api.includes_refit("tensorrt", "10.14.1")
    assert not api.includes_refit("tensorrt", "10.13.3")
