"""README's table of a run's folder is a contract: what it names is what the code writes, by the names of ``runs/folder.py``."""

import re

from tests.conftest import REPOSITORY
from wads_dist.runs import folder


def documented() -> set[str]:
    """The names in README's table, of the run's folder and of a category's."""
    table = (REPOSITORY / "README.md").read_text().split("### A run's folder")[1].split("###")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name.removeprefix("CATEGORY/").rstrip("/") for cell in cells for name in re.findall("`([^`]+)`", cell)}


def test_every_name_is_in_the_readme_and_nothing_else() -> None:
    names = {value for name, value in vars(folder).items() if name.isupper()} - {folder.EXAMPLES_FILE}
    assert documented() == names
