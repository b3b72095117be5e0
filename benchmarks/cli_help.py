"""How long `pairmill --help` takes, as a user sees it: a fresh process each time."""

from __future__ import annotations

import statistics

from benchmarks.compare import Check, Result, run_quietly, script
from cli.main import COMMANDS

GOAL_S = 0.4


def help_seconds(command: list[str], rounds: int) -> list[float]:
    """Wall seconds of `pairmill COMMAND --help`, one a round."""
    return [run_quietly([script("pairmill"), *command, "--help"]) for _ in range(rounds)]


def run(rounds: int, quick: bool) -> Result:
    """The whole command nine times where five rounds are asked for; each subcommand in the same rounds."""
    rounds = 1 if quick else 2 * rounds - 1
    commands = ["download", "filter"] if quick else list(COMMANDS)
    help_seconds([], 1)  # a cold disk is not what is measured
    times: dict[str, list[float]] = {"pairmill": [], **{name: [] for name in commands}}
    for _ in range(rounds):
        for name, seen in times.items():
            seen += help_seconds([] if name == "pairmill" else [name], 1)
    seconds = {f"{name}_s": statistics.median(seen) for name, seen in times.items()}
    slowest = max((s, name) for name, s in seconds.items() if name != "pairmill_s")
    return Result(
        "cli_help",
        "seconds of `pairmill --help` and of each command's, from start to end of the process",
        rounds,
        {"commands": len(commands)},
        seconds,
        [
            Check("pairmill --help, s", seconds["pairmill_s"], GOAL_S, at_least=False),
            Check(f"slowest command's --help ({slowest[1].removesuffix('_s')}), s", slowest[0]),
        ],
        ["typer", "pydantic"],
    )
