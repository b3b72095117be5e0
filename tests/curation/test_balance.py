import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.balance import Matcher, keep_shares, read_entries, spacing
from curation.draws import as_share, uid_draws
from curation.filter import make_selection
from schemas.errors import PairmillError
from schemas.events import Notice
from shards.select import read_selection, selection_about
from tests.curation.scored import numbered, uid, write_dataset, write_scores

# MetaCLIP's substr_matching.py and balancing.py in plain Python; draws as docs/commands.md says.


def plain_spacing(text):
    spaced = f" {text} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        spaced = spaced.replace(mark, f" {mark} ")
    for blank in ["\t", "\n", "\r"]:
        spaced = spaced.replace(blank, " ")
    return spaced


def plain_matches(text, entries):
    return [i for i, entry in enumerate(entries) if f" {entry} " in plain_spacing(text)]


def plain_mix(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_draw(uid, seed):
    hi, lo = int.from_bytes(uid[:8], "big"), int.from_bytes(uid[8:], "big")
    return (plain_mix(plain_mix(plain_mix(seed) ^ hi) ^ lo) >> 11) / 2**53


def plain_balance(texts, uids, entries, t, seed):
    matched = [plain_matches(text, entries) for text in texts]
    count = [sum(i in found for found in matched) for i in range(len(entries))]
    probability = [t / max(c, t) for c in count]
    shares = [1 - math.prod(1 - probability[i] for i in found) for found in matched]
    return [plain_draw(u, seed) < share for u, share in zip(uids, shares, strict=True)]


words = st.sampled_from(
    ["a", "b", "A", "cat", "cats", "red cat", "red", "U.S", "a,", "a , b", ",", ".", "ünï", "猫 猫", " "]
)
glue = st.sampled_from([" ", "", "  ", "\t", "\n", ", ", ".", "!", "`"])
captions = st.lists(st.tuples(words, glue), max_size=8).map(lambda parts: "".join(w + g for w, g in parts))
entry_lists = st.lists(
    words.filter(str.strip) | st.text(min_size=1, max_size=4).filter(str.strip), min_size=1, unique=True
)


@given(captions | st.text())
def test_spacing_is_metaclips(text):
    assert spacing(text) == plain_spacing(text)


@given(st.lists(captions | st.text(max_size=20), max_size=6), entry_lists)
@settings(max_examples=200, deadline=None)
def test_every_entry_between_spaces_is_found_once(texts, entries):
    ids, sizes = Matcher(entries).match([*texts, None])
    ends = np.cumsum(sizes)
    assert [part.tolist() for part in np.split(ids, ends[:-1])] == [*(plain_matches(t, entries) for t in texts), []]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("balance")


@given(
    st.lists(captions, min_size=1, max_size=25), entry_lists, st.integers(1, 4), st.integers(0, 2**40),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_rule_equals_a_plain_implementation(place, texts, entries, t, seed, shards):
    uids = [np.random.default_rng(n).bytes(16) for n in range(len(texts))]
    rows = numbered(len(texts), shards, caption=texts, uid=uids)
    import shutil

    shutil.rmtree(place / "ds", ignore_errors=True)
    dataset = write_dataset(place / "ds", rows)
    (place / "entries.json").write_text(json.dumps(entries))
    want = plain_balance(texts, uids, entries, t, seed)
    rule = {"balance": {"entries": str(place / "entries.json"), "t": t, "seed": seed}}
    if not any(want):
        with pytest.raises(PairmillError, match="No row is left"):
            make_selection(dataset, "s", [rule])
        return
    make_selection(dataset, "s", [rule])
    assert read_selection(dataset, "s").keep.tolist() == want


def entry_file(tmp_path, *entries):
    (tmp_path / "entries.txt").write_text("\n".join(entries) + "\n")
    return str(tmp_path / "entries.txt")


def select(dataset, *rules):
    events = []
    made = make_selection(dataset, "s", list(rules), events.append)
    return np.flatnonzero(read_selection(dataset, "s").keep).tolist(), made, events


def test_rare_things_stay_frequent_ones_are_thinned_and_nothing_named_drops(tmp_path):
    texts = ["a dog"] * 3000 + ["a dog and an axolotl"] * 20 + ["IMG 1234"] * 10 + [None] * 5
    uids = [np.random.default_rng(n).bytes(16) for n in range(len(texts))]
    dataset = write_dataset(tmp_path / "ds", numbered(len(texts), 3, caption=texts, uid=uids))
    kept, made, events = select(dataset, {"balance": {"entries": entry_file(tmp_path, "dog", "axolotl"), "t": 300}})
    assert set(range(3000, 3020)) <= set(kept)
    assert 230 < len(kept) - 20 < 370  # 3000 draws at 300 / 3020
    assert max(kept) < 3020
    assert (made.funnel[-1].rule, made.funnel[-1].nulls) == ("balance 300", 5)
    said = [e.text for e in events if isinstance(e, Notice)]
    assert said == ["balance 300: 2 of 2 entries occur, 1 more than 300 times; 15 of 3,035 rows name none."]


def test_only_rows_that_are_left_are_counted(tmp_path):
    dataset = write_dataset(tmp_path / "ds", numbered(40, 2, caption=["a dog"] * 40, width=[9] * 4 + [1] * 36))
    rule = {"balance": {"entries": entry_file(tmp_path, "dog"), "t": 4}}
    assert select(dataset, {"where": "width > 5"}, rule)[0] == [0, 1, 2, 3]
    assert 0 < len(select(dataset, rule)[0]) < 20


def test_a_row_stays_or_goes_by_its_uid_however_the_dataset_is_cut(tmp_path):
    uids = [np.random.default_rng(n).bytes(16) for n in range(500)]
    rule = {"balance": {"entries": entry_file(tmp_path, "dog"), "t": 100}}
    kept = []
    for shards, order in ((1, range(500)), (7, range(499, -1, -1))):
        rows = numbered(500, shards, caption=["dog"] * 500, uid=[uids[i] for i in order])
        kept.append({uids[order[i]] for i in select(write_dataset(tmp_path / str(shards), rows), rule)[0]})
    assert kept[0] == kept[1]
    assert 60 < len(kept[0]) < 140
    # A higher cap only adds rows.
    more = {**rule["balance"], "t": 200}
    dataset = write_dataset(tmp_path / "1", numbered(500, 1, caption=["dog"] * 500, uid=uids))
    few, many = (set(select(dataset, {"balance": s})[0]) for s in (rule["balance"], more))
    assert few < many


def test_lower_case_is_asked_for(tmp_path):
    dataset = write_dataset(tmp_path / "ds", numbered(4, 1, caption=["Dog", "dog", "DOGS", "a DOG!"]))
    entries = entry_file(tmp_path, "dog", "Dog", "DOG")
    assert select(dataset, {"balance": entries})[0] == [0, 1, 3]
    entries = entry_file(tmp_path, "doG")
    with pytest.raises(PairmillError, match="No row is left"):
        select(dataset, {"balance": entries})
    assert select(dataset, {"balance": {"entries": entries, "lower": True}})[0] == [0, 1, 3]


def test_another_column_carried_or_scored_is_looked_in(tmp_path):
    alt = ["a dog", None, "a cat", "x"]
    dataset = write_dataset(tmp_path / "ds", numbered(4, 2, alt=alt), [pa.field("alt", pa.string())])
    write_scores(dataset, "words", {"made": ["x", "dog", "dog", None]}, pa.string())
    entries = entry_file(tmp_path, "dog")
    assert select(dataset, {"balance": {"entries": entries, "column": "alt"}})[0] == [0]
    assert select(dataset, {"balance": {"entries": entries, "column": "words.made"}})[0] == [1, 2]
    with pytest.raises(PairmillError, match="looks in text, and `width` is Int32"):
        select(dataset, {"balance": {"entries": entries, "column": "width"}})


def test_entries_are_lines_or_a_json_list_each_once(tmp_path):
    (tmp_path / "a.txt").write_bytes("cat\r\n\ncat\n red dog\n猫".encode())
    assert read_entries(str(tmp_path / "a.txt")) == ["cat", " red dog", "猫"]
    (tmp_path / "a.json").write_text('["b", "a", "b", "", "\\ud800"]')
    assert read_entries(str(tmp_path / "a.json")) == ["b", "a"]


def test_the_recipe_holds_the_entries_name_and_fingerprint(tmp_path):
    dataset = write_dataset(tmp_path / "ds", numbered(2, 1, caption=["a dog", "a cat"]))
    entries = entry_file(tmp_path, "dog")
    select(dataset, {"balance": {"entries": entries, "t": 9}})
    (recorded,) = selection_about(dataset, "s")["recipe"]["rules"]
    assert recorded["balance"]["entries"] == "entries.txt"
    again = {"balance": {**recorded["balance"], "entries": entries}}
    assert select(dataset, again)[0] == [0]
    entry_file(tmp_path, "cat")
    with pytest.raises(PairmillError, match="is not what this recipe was made with"):
        select(dataset, again)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("a.txt", b"\n \n", "has no entries"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"{", "not UTF-8 text or JSON"),
        ("a.json", b"[" * 100_000, "not UTF-8 text or JSON"),
        ("a.json", b'{"a": 1}', "not a JSON list"),
        ("a.json", b"[1]", "not a JSON list"),
    ],
)
def test_a_bad_list_is_told(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PairmillError, match=message):
        read_entries(str(tmp_path / name))


@given(
    st.lists(st.lists(st.integers(0, 5), unique=True, max_size=4).map(sorted), min_size=1, max_size=20),
    st.integers(1, 5),
)
def test_shares_are_the_product_of_what_the_entries_leave(rows, t):
    counts = np.bincount([i for row in rows for i in row], minlength=6)
    found, lengths = np.array([i for row in rows for i in row], np.int32), np.array([len(r) for r in rows], np.int32)
    want = [1 - math.prod(1 - t / max(t, counts[i]) for i in row) if row else 0 for row in rows]
    assert keep_shares(found, lengths, counts, t).tolist() == pytest.approx(want, abs=1e-15)


def test_draws_are_even_and_documented():
    uids = [uid(n) for n in range(20_000)]
    hi, lo = np.array([int.from_bytes(u[:8], "big") for u in uids], np.uint64), np.arange(20_000, dtype=np.uint64)
    shares = as_share(uid_draws(hi, lo, 3))
    assert shares[:50].tolist() == [plain_draw(u, 3) for u in uids[:50]]
    assert np.abs(np.sort(shares) - np.arange(20_000) / 20_000).max() < 0.02
    assert abs(np.corrcoef(shares, as_share(uid_draws(hi, lo, 4)))[0, 1]) < 0.03
