"""The one exception for what a user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class PairmillError(Exception):
    """Something the user can mend: what was wrong, where (file, shard, row), what to do next.

    `cli/main` prints the text without a traceback and exits with 2.
    """


def suggest(name: str, choices: Iterable[str]) -> str:
    """' Did you mean `X`?' for the nearest of `choices`, or '' when none is near."""
    near = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
