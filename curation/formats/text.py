"""Plain text: a caption a line, no images. Its rows have the status `no_image`; blank lines are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curation.formats.listed import find_lists, opened
from curation.formats.samples import Sample, Source, clean
from curation.list_text import text_lines
from curation.maintenance_config import ImportConfig
from schemas.status import NO_IMAGE


def sources(paths: Sequence[str]) -> list[Source]:
    """Text files among `paths`. Raises PairmillError where there is none."""
    return find_lists(paths, (".txt", ".text"), "text file (.txt)")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A row a line, file after file. Raises PairmillError for a line of more than 64 Mi characters."""
    for source in sources:
        with opened(source) as text:
            for number, line in enumerate(text_lines(text, source.url), 1):
                if line.strip():
                    yield Sample(f"{source.name} line {number}", None, [clean(line)], status=NO_IMAGE)
