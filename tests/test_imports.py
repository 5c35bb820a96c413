"""Imports run one way, no file is imported by what it imports, and no function is longer than a screen."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = (
    "shards kernels common config runs data model evaluation reporting deploy training scheduler profiling sweep launch"
).split()
"""``wads_dist``'s packages from the ground up."""


def package(module: str) -> str:
    return (*module.split("."), "")[1]


def imports(file: Path) -> set[str]:
    """Modules of ours that the file imports, also late, or for a type checker alone."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(REPOSITORY).parts[: -node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                inner = REPOSITORY / module.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{module}.{alias.name}" if inner.is_file() else module)
    return {name for name in found if name.startswith("wads_dist.")}


def source(module: str) -> str:
    path = REPOSITORY / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


GRAPH = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): imports(file)
    for folder in sorted((REPOSITORY / "wads_dist").iterdir())
    for file in sorted(folder.rglob("*.py"))
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_run_down(module: str) -> None:
    floor = {name: number for number, name in enumerate(LAYERS)}
    up = {to for to in GRAPH[module] if floor.get(package(to), 0) > floor.get(package(module), 0)}
    assert not up, f"{module} imports from above: {', '.join(sorted(up))}"
    if package(module) in ("kernels", "shards"):  # which can be lifted out, under any name
        assert all(package(to) == package(module) for to in GRAPH[module])
        assert not re.search(r"^\s*(?:from|import) wads_dist", source(module), re.MULTILINE)


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: to - {module} for module, to in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_function_is_longer_than_a_screen() -> None:
    """But for kernels, whose body is one thought."""
    long = [
        f"{module}.{node.name}"
        for module in GRAPH
        if package(module) != "kernels"
        for node in ast.walk(ast.parse(source(module)))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60
    ]
    assert not long
