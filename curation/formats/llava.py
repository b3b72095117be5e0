"""LLaVA's JSON: a list of `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...]}`.

What `gpt` says is a caption. An entry of one question and one answer keeps the question as `prompt`; a longer one
keeps its `conversations` as JSON text. Written: `llava.json`, an entry a caption (LLaVA's pretraining takes one
question and one answer an entry); a row that carries `conversations` that still fit its captions is written with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from curation.formats.listed import OURS, Images, ListWriter, find_lists, joined, json_list, opened, sample_of
from curation.formats.samples import Sample, Source
from curation.list_json import json_rows
from curation.maintenance_config import ImportConfig

IMAGE_TOKEN = "<image>"
PROMPT = "Describe the image."
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


def sources(paths: Sequence[str]) -> list[Source]:
    """JSON lists among `paths`. Raises PairmillError where there is none."""
    return find_lists(paths, (".json", ".jsonl"), "JSON list")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A pair an entry, list after list; entries that differ in one answer alone are one pair. Entries without an image
    are `no_image`. One entry is in memory at a time.

    Raises PairmillError: damaged JSON, an entry that is no object, a name that leaves its folder.
    """
    for source in sources:
        yield from joined(_entries(source, config))


def _entries(source: Source, config: ImportConfig) -> Iterator[tuple[Any, Sample]]:
    images = Images(source, config)
    for number, record in enumerate(json_rows(partial(opened, source), source.url)):
        values = {k: v for k, v in record.items() if k not in ("image", "conversations", OURS)}
        turns = _turns(record.get("conversations"))
        values["captions"] = [text for who, text in turns if who in _ANSWERS] or None
        plain = len(turns) == 2 and turns[0][0] in _ASKS and turns[1][0] in _ANSWERS
        if plain:
            values["prompt"] = turns[0][1].replace(IMAGE_TOKEN, "").strip()
        elif turns:
            values["conversations"] = record["conversations"]
        name = record.get("image")
        sample = sample_of(images, f"{source.name} entry {number}", name, record, values, config)
        yield (name if plain else None), sample


def _turns(conversations: Any) -> list[tuple[str, str]]:
    """(who, text) of each turn that has both."""
    turns = conversations if isinstance(conversations, list) else []
    found = [(t.get("from"), t.get("value")) for t in turns if isinstance(t, dict)]
    return [(who, text) for who, text in found if isinstance(who, str) and isinstance(text, str)]


class Writer(ListWriter):
    """Writes `llava.json` and `images/`."""

    index = "llava.json"

    def text(self, lines: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[str]:
        yield from json_list(entry for line in lines() for entry in _written(line))
        yield "\n"


def _written(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    captions, values = line["captions"], line["values"]
    key = line["key"] if values.get("id") is None else values["id"]
    whole = _kept(values.get("conversations"), captions)
    if whole is not None:
        yield {"id": key, "image": line["image"], "conversations": whole, OURS: values}
        return
    prompt = values.get("prompt") if isinstance(values.get("prompt"), str) else None
    for number, caption in enumerate(captions or [""]):
        turns = [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{PROMPT if prompt is None else prompt}"},
            {"from": "gpt", "value": caption},
        ]
        name = f"{key}_{number}" if number else key
        yield {"id": name, "image": line["image"], "conversations": turns, OURS: values}


def _kept(text: Any, captions: list[str]) -> list[Any] | None:
    """Carried conversations, where their answers are the row's captions still."""
    try:
        turns = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    fit = isinstance(turns, list) and captions and [t for who, t in _turns(turns) if who in _ANSWERS] == captions
    return turns if fit else None
