"""Imports run one way, and no file is imported by what it imports."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = (
    "shards kernels common config runs data model evaluation reporting deploy training scheduler profiling sweep launch"
).split()
"""From the ground up: ``wads_dist``'s packages between the folders that stand beside it."""


def package(module: str) -> str:
    first, second, *_ = (*module.split("."), "", "")
    return second if first == "wads_dist" else first


def imports(file: Path) -> set[str]:
    """Modules of ours that the file imports, also late; what a type checker alone reads is none."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = REPOSITORY / node.module.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{node.module}.{alias.name}" if inner.is_file() else node.module)
    return {name for name in found if name.split(".")[0] in ("wads_dist", "kernels", "shards", "launch")}


GRAPH = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): imports(file)
    for folder in ("wads_dist", "kernels", "shards", "launch")
    for file in sorted((REPOSITORY / folder).rglob("*.py"))
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_run_down(module: str) -> None:
    floor = {name: number for number, name in enumerate(LAYERS)}
    up = {to for to in GRAPH[module] if floor.get(package(to), 0) > floor.get(package(module), 0)}
    assert not up, f"{module} imports from above: {', '.join(sorted(up))}"
    if module.startswith(("kernels", "shards")):  # which can be lifted out
        assert all(to.split(".")[0] == module.split(".")[0] for to in GRAPH[module])


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: to - {module} for module, to in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
