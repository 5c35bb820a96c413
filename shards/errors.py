"""The two exceptions of this package. Both name the file or field, what was wrong, and what to do."""

from collections.abc import Iterable


class DataError(Exception):
    """Data that cannot be used as it is: the message says which, why, and what to do about it."""


class DataProblems(DataError):
    """Several problems found in one pass, so that a person can mend them all at once.

    Attributes:
        problems: one self-contained sentence each, in the order found; `str()` lists them one a line.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: list[str] = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["DataProblems"], tuple[list[str]]]:
        # Exceptions are pickled by their args; a worker process must hand back the list, not its joined text.
        return DataProblems, (self.problems,)
