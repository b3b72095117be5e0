"""The pages' own files: a fixed list, read from the package. No path of a request is ever opened."""

from __future__ import annotations

from pathlib import Path

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOLDER = Path(__file__).parent


def page_files(*names: str) -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, content type)."""
    return {n: ((FOLDER / n).read_bytes(), f"{TYPES[Path(n).suffix]}; charset=utf-8") for n in names}
