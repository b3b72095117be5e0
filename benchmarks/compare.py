"""What every benchmark shares: interleaved medians, goals, memory of a process tree, result files and their table."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
START, END = "<!-- results -->", "<!-- end of results -->"
NONE: Mapping[str, str] = MappingProxyType({})
SAMPLE_S = 0.05  # how often memory is looked at


@dataclass(frozen=True)
class Check:
    """A number with a goal. `at_least`: the goal is a floor, else a ceiling; `goal` None is shown, not judged."""

    what: str
    value: float
    goal: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome: medians by name (unit in the name), and what is asked of them."""

    benchmark: str
    what: str
    rounds: int
    sizes: Mapping[str, Any]
    medians: Mapping[str, float]
    checks: Sequence[Check]
    packages: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """With the machine, the versions and the day."""
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": {name: version(name) for name in self.packages},
            "rounds": self.rounds,
            "sizes": dict(self.sizes),
            "medians": {name: rounded(value) for name, value in self.medians.items()},
            "checks": [{**asdict(c), "value": rounded(c.value), "met": c.met} for c in self.checks],
            "notes": list(self.notes),
        }


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def machine() -> dict[str, object]:
    """Where it ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory), "python": platform.python_version()}
    return {**about, "load": round(os.getloadavg()[2], 1)}  # of 15 minutes: who else was on the machine


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same, answering with its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def medians(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each run answers with; interleaved, so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return {name: statistics.median(values) for name, values in times.items()}


def python(*arguments: str) -> list[str]:
    """A command line of this interpreter."""
    return [sys.executable, *arguments]


def script(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def run_quietly(
    command: Sequence[str], environment: Mapping[str, str] = NONE, watch: Callable[[int], None] | None = None
) -> float:
    """Runs a command to its end; its seconds. `watch` is called with its process id at the start.

    Raises RuntimeError with what it said where it failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        if watch is not None:
            watch(child.pid)
        said, _ = child.communicate()
    seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"{command[0]} ended with {child.returncode}: {said.decode(errors='replace')[-2000:]}")
    return seconds


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: `pss` (shared pages by share) and `anonymous` (not backed by a file)."""
    found = {"Pss:": 0, "Anonymous:": 0}
    with contextlib.suppress(OSError):  # it may have ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in found:
                found[name] = int(rest[0]) * 1024
    return {"pss": found["Pss:"], "anonymous": found["Anonymous:"]}


class PeakMemory:
    """The most that a process and its descendants hold together, sampled from a thread."""

    def __init__(self) -> None:
        self.peak = {"pss": 0, "anonymous": 0}
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        """Starts to look at `pid`, until it has ended."""
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def _sample(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                tree = [pid, *(child.pid for child in process.children(recursive=True))]
                parts = [memory_of(one) for one in tree]
                for name, most in self.peak.items():
                    self.peak[name] = max(most, sum(part[name] for part in parts))
                time.sleep(SAMPLE_S)


def peak_memory(command: Sequence[str], environment: Mapping[str, str] = NONE) -> dict[str, int]:
    """Peak bytes of a command's process tree while it runs: `pss`, `anonymous`."""
    memory = PeakMemory()
    run_quietly(command, environment, memory.watch)
    return memory.peak


def show(result: Mapping[str, Any]) -> None:
    """A small table, then the same as a line of JSON."""
    print(f"{result['benchmark']}: {result['what']}")
    print(f"  median of {result['rounds']}; " + ", ".join(f"{k} {v}" for k, v in result["sizes"].items()))
    width = max(map(len, [*result["medians"], *(c["what"] for c in result["checks"])]), default=0) + 2
    for name, value in result["medians"].items():
        print(f"  {name:{width}}{value:>12,g}")
    for check in result["checks"]:
        print(f"  {check['what']:{width}}{check['value']:>12,g}{_goal(check)}")
    for note in result["notes"]:
        print(f"  {note}")
    print(json.dumps(result), flush=True)


def _goal(check: Mapping[str, Any]) -> str:
    if check["goal"] is None:
        return ""
    sense = "at least" if check["at_least"] else "at most"
    return f"   goal: {sense} {check['goal']:g}, {'met' if check['met'] else 'MISSED'}"


def write(result: Mapping[str, Any]) -> None:
    """benchmarks/results/NAME.json, and the table of the page made again."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['benchmark']}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def standing() -> Iterator[dict[str, Any]]:
    """The results that stand, by name."""
    for path in sorted(RESULTS.glob("*.json")):
        yield json.loads(path.read_text())


def table() -> str:
    """The results that stand, as Markdown."""
    lines = ["| benchmark | number | value | goal | |", "| --- | --- | ---: | ---: | --- |"]
    seen: dict[str, list[str]] = {}
    for result in standing():
        where = result["machine"]
        place = f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, Python {where['python']}"
        told = f"{result['benchmark']} ({result['date']}, load {where['load']:g})"
        seen.setdefault(place, []).append(told)
        lines += [_line(result["benchmark"], check) for check in result["checks"]]
    made = [f"{place}: {', '.join(names)}." for place, names in seen.items()]
    return "\n".join([*lines, "", *made])


def _line(name: str, check: Mapping[str, Any]) -> str:
    sense = "≥" if check["at_least"] else "≤"
    goal = "" if check["goal"] is None else f"{sense} {check['goal']:g}"
    verdict = {True: "met", False: "missed", None: ""}[check["met"]]
    return f"| {name} | {check['what']} | {check['value']:g} | {goal} | {verdict} |"


def write_page() -> None:
    """The table of docs/benchmarks.md, made again from the results that stand."""
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")
