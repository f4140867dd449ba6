"""Who is told how far a study is."""

from typing import Protocol


class Progress(Protocol):
    """Who is told how far things are."""

    def say(self, text: str) -> None:
        """A line about what was done."""

    def doing(self, text: str) -> None:
        """What is under way; holds until the next call of either."""


class Lines:
    """Prints a line for each thing done."""

    def say(self, text: str) -> None:
        """Prints at once."""
        print(text, flush=True)

    def doing(self, text: str) -> None:
        """Is silent."""


LINES = Lines()
