"""The house's rules: who imports whom, who prints, what a configuration module may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "schemas": set(),
    "shards": {"schemas"},
    "extractors": {"schemas", "shards"},
    "curation": {"schemas", "shards", "extractors"},
    "training": {"schemas", "shards"},
    "downstream": {"schemas", "shards", "extractors", "training"},
    "cli": {"schemas", "shards", "extractors", "curation", "training", "downstream"},
}
MODULES = sorted(p for folder in ALLOWED for p in (ROOT / folder).rglob("*.py"))
HEAVY = ("torch", "open_clip", "polars", "pyarrow", "dask", "distributed", "timm", "transformers", "torchvision")
HEAVY += ("cv2", "numpy", "img2dataset", "PIL", "aiohttp", "matplotlib")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported, in functions, too."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            out.add((node.module or "").split(".")[0])
    return out


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_folder_imports_only_what_it_may(path):
    folder = path.relative_to(ROOT).parts[0]
    foreign = imports(ast.parse(path.read_text())) & (set(ALLOWED) | {"tests", "benchmarks"})
    assert foreign <= ALLOWED[folder] | {folder}


@pytest.mark.parametrize("path", [p for p in MODULES if not p.is_relative_to(ROOT / "cli")], ids=name_of)
def test_only_the_command_line_prints_and_parses(path):
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"print", "input"}
    assert not imports(tree) & {"argparse", "typer", "click", "rich"}


CONFIGS = [p for p in MODULES if "config" in p.stem]
LIGHT = ["schemas.config", "schemas.errors", "schemas.events", "schemas.status", "schemas.sidecars", "cli.main"]


def test_configuration_modules_are_found():
    assert ROOT / "schemas/config.py" in CONFIGS
    assert ROOT / "curation/maintenance_config.py" in CONFIGS


def test_configuration_modules_load_no_heavy_library():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in CONFIGS]
    code = f"""
import importlib, sys
for name in {sorted({*names, *LIGHT})!r}:
    importlib.import_module(name)
    loaded = [m for m in {HEAVY!r} if m in sys.modules]
    assert not loaded, f"{{name}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_test_or_module_reads_the_workplace():
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        if path != Path(__file__):
            text = path.read_text()
            assert "/work/" not in text, name_of(path)
            assert "../shared" not in text, name_of(path)
