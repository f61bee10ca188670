"""The layout that the documentation promises: import direction, one owner per heavy library, catalogs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "recipes", "infra")
FORBIDDEN = {
    "recipes": {"flows", "tasks", "infra"},
    "tasks": {"flows", "infra"},
    "flows": {"infra"},
    "infra": {"recipes"},
}
OWNERS = {
    "mlflow": {"tasks/registry*.py", "tasks/serving.py"},
    "modelopt": {
        f"tasks/{n}.py"
        for n in (
            "auto_precision",
            "calibrate",
            "checkpoints",
            "export",
            "handover",
            "load",
            "observe",
            "sparsify",
            "trainer",
        )
    }
    | {"recipes/int8_checkpoint.py"},  # stands for another team's code
    "onnxruntime": {"tasks/engines/onnxruntime*.py", "tasks/peak_memory.py"},
    "tensorrt": {"tasks/engines/tensorrt*.py"},
    "tensorrt_rtx": {"tasks/engines/tensorrt*.py"},
    "polygraphy": {"tasks/engines/tensorrt*.py"},
}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "modelopt",
    "mlflow",
    "onnxruntime",
    "tensorrt",
    "scipy",
    "sklearn",
}


def modules() -> list[Path]:
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_imports_go_one_way() -> None:
    for file in modules():
        package = file.relative_to(ROOT).parts[0]
        assert not imports(ast.parse(file.read_text())) & FORBIDDEN[package], file


def test_infra_uses_little_of_the_rest() -> None:
    allowed = {"settings", "store", "errors", "git", "repositories", "InputError", "Repository"}
    for file in (ROOT / "infra").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES[:3]:
                assert {alias.name for alias in node.names} <= allowed, file


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_named_owners(library: str) -> None:
    users = {f.relative_to(ROOT) for f in modules() if library in imports(ast.parse(f.read_text()))}
    strangers = [str(user) for user in users if not any(user.match(owner) for owner in OWNERS[library])]
    assert users, f"nothing imports {library}; the rule is out of date"
    assert not strangers


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    allowed = {
        "serving.py": {"mlflow"},
        "statistics.py": {"scipy"},
        "trainer.py": {"torch", "transformers"},
        "shards.py": {"torch"},
    }
    for file in modules():
        tree = ast.parse(file.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        heavy = imports(ast.Module(body=list(top), type_ignores=[])) & HEAVY
        assert not heavy - allowed.get(file.name, set()), file


def test_no_package_shadows_an_installed_one() -> None:
    for package in (*PACKAGES, "tasks/engines", "tasks/types"):
        assert (ROOT / package / "__init__.py").is_file()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_recipe_starts_with_its_command_and_stands_in_the_catalog() -> None:
    readme = (ROOT / "README.md").read_text()
    catalog = set(re.findall(r"^\| `([\w.-]+)` \|", readme, re.MULTILINE))
    assert catalog == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    for file in (ROOT / "recipes").glob("*.yaml"):
        assert file.read_text().startswith(f"# python -m flows optimize {file.stem}\n"), file


def test_the_file_tree_in_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().split("## How it works")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert named == {file.name for file in modules() if file.name != "__init__.py"}


def test_links_in_the_documentation_resolve_and_nothing_is_left_to_fill_in() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        assert not re.findall(r"\b(?:TODO|FIXME|[A-Z]+_(?:OUTPUT|WHY|TREE)|SECONDS)\b", text), page
