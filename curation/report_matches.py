"""Duplicates and contaminated rows of a selection, side by side with what they are too like, for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curation.charts import number
from curation.matches import read_matches
from curation.rules import Match
from curation.thumbnails import MAX_CAPTION, groups_of, thumbnail
from shards.dataset import Dataset

MOST_IN_A_GROUP = 5  # dropped rows shown beside the one that stays

Picture = Mapping[str, Any]


def chosen_matches(dataset: Dataset, name: str, pictures: int, row_groups: int) -> dict[str, list[list[Match]]]:
    """The matches of a selection to show, by rule, in groups of one row that stays.

    At most so many `pictures` in all, out of at most so many `row_groups`.
    """
    out: dict[str, list[list[Match]]] = {}
    found = {rule: _groups(matches) for rule, matches in read_matches(dataset, name).items()}
    opened: set[tuple[int, int]] = set()
    each = pictures // max(1, len(found))
    for i, (rule, groups) in enumerate(found.items()):
        room, may_open = each, -(-row_groups * (i + 1) // len(found))
        for group in groups:
            needs = opened | groups_of(dataset, _rows(group)).keys()
            if len(group) + 1 <= room and len(needs) <= may_open:
                room -= len(group) + 1
                opened |= needs
                out.setdefault(rule, []).append(group)
    return out


def _rows(group: Sequence[Match]) -> list[int]:
    return [n for m in group for n in (m.row, m.like) if n is not None]


def _groups(matches: Sequence[Match]) -> list[list[Match]]:
    """Matches with one row that stays together, the largest groups first."""
    by: dict[Any, list[Match]] = {}
    for m in matches:
        key = ("row", m.like) if m.like is not None else ("other", m.other or m.row)
        by.setdefault(key, []).append(m)
    groups = [g[:MOST_IN_A_GROUP] for g in by.values()]
    return sorted(groups, key=lambda g: (-(g[0].group or 0), -len(g)))


def rows_of(shown: Mapping[str, Sequence[Sequence[Match]]]) -> list[int]:
    """Numbers of the dataset's rows that these matches show."""
    return sorted({n for groups in shown.values() for group in groups for n in _rows(group)})


def side_by_side(
    shown: Mapping[str, Sequence[Sequence[Match]]], pictures: Mapping[int, Picture]
) -> list[dict[str, Any]]:
    """For the page: each rule's groups, the row that stays (or the pair of another dataset) and the dropped ones."""
    return [{"rule": rule, "groups": [_group(g, pictures) for g in groups]} for rule, groups in shown.items()]


def _group(group: Sequence[Match], pictures: Mapping[int, Picture]) -> dict[str, Any]:
    first = group[0]
    dropped = [{**pictures[m.row], "value": None if m.value is None else number(m.value)} for m in group]
    if first.like is not None:
        return {"size": first.group, "stays": pictures[first.like], "other": None, "dropped": dropped}
    if first.other is None and first.image is None and first.caption is None:
        return {"size": first.group, "stays": None, "other": None, "dropped": dropped}
    data = thumbnail(first.image) if first.image else None
    stays = {"data": data, "caption": (first.caption or "")[:MAX_CAPTION], "place": first.other}
    return {"size": first.group, "stays": stays, "other": first.other, "dropped": dropped}


def numbers_of(shown: Mapping[str, Sequence[Sequence[Match]]], pictures: Mapping[int, Picture]) -> dict[str, Any]:
    """For the JSON: the same groups by place, without pictures."""

    def place(number: int | None) -> str | None:
        return None if number is None else f"{pictures[number]['shard']}:{pictures[number]['row']}"

    return {
        rule: [
            {
                "rows": g[0].group,
                "stays": place(g[0].like) or g[0].other,
                "dropped": [{"row": place(m.row), "value": m.value} for m in g],
            }
            for g in groups
        ]
        for rule, groups in shown.items()
    }
