"""Commands as a user starts them, ended by SIGKILL when they have come so far, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LIMIT_S = 240.0

Progress = Callable[[], int]


class Command:
    """`pairmill WORDS` as a process; its lines are in `log`, beside those of the runs before."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("ab") as stream:
            line = [sys.executable, "-m", "cli.main", *words]
            self.process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream)

    def reaches(self, progress: Progress, wanted: int) -> bool:
        """Waits until `progress()` is `wanted`; False where the command ended before."""
        end = time.monotonic() + LIMIT_S
        while progress() < wanted:
            assert time.monotonic() < end, f"stuck at {progress()} of {wanted}: {self.log.read_text()}"
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the process that the user sees; its workers notice by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Waits for exit status 0."""
        assert self.process.wait(LIMIT_S) == 0, self.log.read_text()


def run_killed(words: Sequence[str], log: Path, progress: Progress, moments: Sequence[int]) -> int:
    """Kills the command at each moment in turn and then lets it end; how many of the kills came in time."""
    in_time = 0
    for moment in moments:
        command = Command(words, log)
        in_time += command.reaches(progress, moment)
        command.kill()
    Command(words, log).finish()
    return in_time
