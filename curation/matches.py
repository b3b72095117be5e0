"""`selections/NAME.matches.json`: a few rows of a selection beside what they were dropped for.

Each rule that compares rows (dedup, decontaminate, placeholder) leaves at most 40. The selection's metadata holds the
file's sha256: a file of an older run of the filter is never taken for this one's.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curation.rules import Match
from schemas.errors import PairmillError
from shards.dataset import Dataset
from shards.scan import starts
from shards.select import selection_about

MAX_EACH = 40  # matches of a rule
MAX_BYTES = 32 << 20  # of the file: 40 thumbnails are some 300 kB
MAX_CAPTION = 300


def choose(groups: np.ndarray, seed: int = 0, limit: int = MAX_EACH) -> np.ndarray:
    """Which dropped rows to show: indices into `groups`, ascending, at most `limit`, the same for one seed.

    groups  int64 [dropped rows]: the group each belongs to, such as the number of the row that stays

    Half of the places go to the largest groups, one row each; the rest to any rows.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(groups))
    names, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    largest = np.lexsort((names, -counts))[: limit // 2]
    lead = order[first[largest]]
    rest = order[~np.isin(order, lead)]
    return np.sort(np.concatenate([lead, rest[: limit - len(lead)]]))


def encode_matches(dataset: Dataset, matches: Mapping[str, Sequence[Match]]) -> bytes:
    """The file's bytes: each rule's first 40 matches under its label, rows as [shard, row], pictures in base64."""
    begin = starts(dataset)

    def place(number: int | None) -> list[int] | None:
        if number is None:
            return None
        shard = int(np.searchsorted(begin, number, side="right")) - 1
        return [shard, int(number - begin[shard])]

    rules = {
        label: [
            {
                "row": place(m.row),
                "like": place(m.like),
                "value": m.value,
                "group": m.group,
                "other": m.other,
                "caption": None if m.caption is None else m.caption[:MAX_CAPTION],
                "image": None if m.image is None else base64.b64encode(m.image).decode(),
            }
            for m in found[:MAX_EACH]
        ]
        for label, found in matches.items()
    }
    return (json.dumps({"rules": rules}, indent=1, ensure_ascii=False) + "\n").encode()


def file_name(name: str) -> str:
    return f"selections/{name}.matches.json"


def put_matches(dataset: Dataset, name: str, matches: Mapping[str, Sequence[Match]]) -> dict[str, Any] | None:
    """Writes the file, or removes an older one where no rule has a match.

    To be called before the selection is written, under its lock. Returns what the selection's metadata holds of it:
    `sha256` and how many matches of each rule.
    """
    found = {label: rows for label, rows in matches.items() if rows}
    if not found:
        if dataset.folder.exists(file_name(name)):
            dataset.folder.remove(file_name(name))
        return None
    data = encode_matches(dataset, found)
    dataset.folder.write_bytes(file_name(name), data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "rows": {k: min(len(v), MAX_EACH) for k, v in found.items()}}


def read_matches(dataset: Dataset, name: str) -> dict[str, tuple[Match, ...]]:
    """The matches of selection `name` by the rule's label (as in the funnel); {} where it has none.

    {} also while a filter that was killed left the file of another run. Raises PairmillError: no such selection, a
    damaged file.
    """
    about = selection_about(dataset, name).get("matches")
    file = file_name(name)
    if about is None or not dataset.folder.exists(file):
        return {}
    if dataset.folder.size(file) > MAX_BYTES:
        raise PairmillError(f"{dataset.url}/{file} is larger than {MAX_BYTES >> 20} MiB: not written by pairmill.")
    data = dataset.folder.read_bytes(file)
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        return {}
    begin = starts(dataset)
    try:
        rules = json.loads(data)["rules"]
        return {str(label): tuple(_match(m, begin) for m in found[:MAX_EACH]) for label, found in rules.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairmillError(
            f"{dataset.url}/{file} is damaged ({type(error).__name__}: {str(error)[:100]}). "
            f"Run the `pairmill filter` command for `{name}` again."
        ) from None


def _match(item: Mapping[str, Any], begin: np.ndarray) -> Match:
    """Raises ValueError for a row that the dataset does not have."""

    def number(place: Any) -> int | None:
        if place is None:
            return None
        shard, row = map(int, place)
        if not (0 <= shard < len(begin) - 1 and 0 <= row < begin[shard + 1] - begin[shard]):
            raise ValueError(f"no row {shard}:{row}")
        return int(begin[shard]) + row

    row, value, group, other = number(item["row"]), item["value"], item["group"], item["other"]
    if row is None:
        raise ValueError("a match without a row")
    return Match(
        row=row,
        like=number(item["like"]),
        value=None if value is None else float(value),
        group=None if group is None else int(group),
        other=None if other is None else str(other)[:MAX_CAPTION],
        image=None if item["image"] is None else base64.b64decode(item["image"], validate=True),
        caption=None if item["caption"] is None else str(item["caption"])[:MAX_CAPTION],
    )
