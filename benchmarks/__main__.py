"""Pairmill beside its peers.

    python -m benchmarks [NAME...] [--rounds 5] [--quick]
    python -m benchmarks --table

Each benchmark runs in a process of its own, prints a table and a line of JSON, and writes benchmarks/results/NAME.json
and the table of docs/benchmarks.md. --quick takes tiny sizes and one round, and writes nothing: its numbers only show
that it runs. docs/benchmarks.md says what each measures.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from typing import Any

from benchmarks.compare import ROOT, python, show, table, write, write_page

NAMES = (
    "download",
    "clip_score",
    "extract",
    "features",
    "training_input",
    "filter",
    "near_duplicates",
    "statistics",
    "report",
    "browse",
    "semantic_dedup",
    "cli_help",
    "memory",
    "curation_quality",
)


def measure(name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """One benchmark's result as JSON values."""
    return importlib.import_module(f"benchmarks.{name}").run(rounds, quick).as_json()


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} [default: all]")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed; medians are told")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, nothing written")
    parser.add_argument("--table", action="store_true", help="only make the table of docs/benchmarks.md again")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.table:
        write_page()
        print(table())
        return 0
    if len(args.names) == 1:
        result = measure(args.names[0], args.rounds, args.quick)
        show(result)
        if not args.quick:
            write(result)
        return 0
    options = ["--rounds", str(args.rounds), *(["--quick"] if args.quick else [])]
    ended = [subprocess.call(python("-m", "benchmarks", n, *options), cwd=ROOT) for n in args.names or NAMES]
    return max(ended)


if __name__ == "__main__":
    sys.exit(main())
