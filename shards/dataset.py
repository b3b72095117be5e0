"""A dataset on disk: its manifest, and where each stage's shards lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import PairmillError, suggest
from schemas.sidecars import FORMAT, FORMAT_VERSION, ListSource, Manifest, Sidecar, check_same
from schemas.tables import DIGEST, WHOLE
from shards.files import Folder, open_folder

MANIFEST = "dataset.json"
INPUT, PAIRS = "input", "pairs"
_SUFFIX = {"input": ".parquet", "pairs": ".parquet", "scores": ".parquet", "tasks": ".parquet", "features": ".arrow"}


class Dataset:
    """Shards of row-aligned files in a folder. Row i of shard s is row i everywhere."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, url: str | Path) -> Dataset:
        """Raises PairmillError where no dataset stands, or one written by a newer pairmill."""
        folder = open_folder(url)
        if not folder.exists(MANIFEST):
            if folder.names(INPUT) or folder.names(PAIRS):
                raise PairmillError(
                    f"{folder.url} holds an unfinished dataset (no {MANIFEST} yet). "
                    "Run the same `pairmill download` or `pairmill import` command again: it goes on where it stopped."
                )
            raise PairmillError(
                f"{folder.url} is not a dataset: it has no {MANIFEST}. Make one with `pairmill download`."
            )
        return cls(folder, read_manifest(folder))

    def __len__(self) -> int:
        return sum(self.manifest.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.folder.url, self.manifest))

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def shard_name(self, shard: int) -> str:
        """`00042`, as wide as the manifest says."""
        return shard_name(shard, self.manifest.shard_width)

    def stage(self, path: str) -> Stage:
        """The stage at `path`: `input`, `pairs`, `scores/NAME`, `features/NAME`, `tasks/NAME`."""
        return Stage(self, path)

    def stages(self) -> list[Stage]:
        """Every stage that has a sidecar, in the order pairs, scores, features, tasks."""
        found = [PAIRS] + [f"{kind}/{n}" for kind in ("scores", "features", "tasks") for n in self.folder.folders(kind)]
        return [s for s in map(self.stage, found) if s.sidecar() is not None]

    def require(self, path: str) -> Stage:
        """The stage, which must have been written. Raises PairmillError that lists what there is."""
        stage = self.stage(path)
        if stage.sidecar() is None:
            have = [s.path for s in self.stages()]
            raise PairmillError(
                f"{self.url} has no {path}.{suggest(path, have)} It has: {', '.join(have) or 'nothing yet'}."
            )
        return stage

    def locate(self, text: str) -> tuple[int, int]:
        """(shard, row) of `N`, which counts over the dataset, or of `S:N`.

        Raises PairmillError where there is no such row.
        """
        try:
            first, *rest = [int(part) for part in text.split(":")]
        except ValueError:
            raise PairmillError(f"`{text}` is no row: give N (counted over the dataset) or S:N.") from None
        if rest:
            shard, row = first, rest[0]
            if len(rest) == 1 and 0 <= shard < self.num_shards and 0 <= row < self.manifest.shards[shard]:
                return shard, row
        elif 0 <= first < len(self):
            for shard, rows in enumerate(self.manifest.shards):
                if first < rows:
                    return shard, first
                first -= rows
        raise PairmillError(f"{self.url} has no row {text}: it has {len(self):,} rows in {self.num_shards:,} shards.")

    def whole_digest(self) -> str:
        """blake2b-128 of the digests of all pairs shards: any change of a shard, and growth, changes it.

        Raises PairmillError where a shard of pairs is missing.
        """
        digests = self.stage(PAIRS).digests(range(self.num_shards))
        return hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()

    def refresh(self) -> Dataset:
        """The dataset as its manifest stands now."""
        return Dataset(self.folder, read_manifest(self.folder))


def _reopen(url: str, manifest: Manifest) -> Dataset:
    return Dataset(open_folder(url), manifest)


def shard_name(shard: int, width: int = 5) -> str:
    return f"{shard:0{width}d}"


def read_manifest(folder: Folder) -> Manifest:
    """Raises PairmillError for a file that is none, or one of a newer version."""
    where = f"{folder.url}/{MANIFEST}"
    try:
        data = json.loads(folder.read_bytes(MANIFEST))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PairmillError(f"{where} is not a pairmill dataset's manifest.")
        if data["version"] > FORMAT_VERSION:
            raise PairmillError(
                f"{where} has format version {data['version']}; this pairmill reads {FORMAT_VERSION}. "
                "Install a newer pairmill."
            )
        return Manifest(**data)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise PairmillError(f"{where} is damaged: {str(error).splitlines()[0]}") from None


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Writes `dataset.json`, whole: the last step of making or growing a dataset."""
    folder.write_bytes(MANIFEST, (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode())


def new_manifest(
    shard_rows: int, shards: Iterable[int], lists: Iterable[ListSource] = (), columns: dict[str, str] | None = None
) -> Manifest:
    return Manifest(shard_rows=shard_rows, shards=tuple(shards), lists=tuple(lists), columns=columns or {})


@dataclass(frozen=True)
class Stage:
    """One folder of shard files: `pairs`, `scores/clip`, `features/patches`, ..."""

    dataset: Dataset
    path: str

    @property
    def kind(self) -> str:
        return self.path.split("/", 1)[0]

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> Folder:
        return self.dataset.folder

    def file(self, shard: int) -> str:
        return f"{self.path}/{self.dataset.shard_name(shard)}{_SUFFIX[self.kind]}"

    def sidecar(self) -> Sidecar | None:
        """Raises PairmillError for a damaged one."""
        name = f"{self.path}/sidecar.json"
        if not self.folder.exists(name):
            return None
        try:
            return Sidecar(**json.loads(self.folder.read_bytes(name)))
        except (ValueError, TypeError) as error:
            raise PairmillError(f"{self.folder.url}/{name} is damaged: {str(error).splitlines()[0]}") from None

    def begin(self, sidecar: Sidecar, mend: str) -> Sidecar:
        """Writes the sidecar before the first shard, or checks that the one that stands is the same.

        Returns the one that stands. Raises PairmillError that names the difference; `mend` says what to do then.
        """
        old = self.sidecar()
        if old is not None:
            check_same(old, sidecar, f"{self.folder.url}/{self.path}", mend)
            return old
        text = json.dumps(sidecar.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        self.folder.write_bytes(f"{self.path}/sidecar.json", text.encode())
        return sidecar

    def standing(self) -> set[int]:
        """Shards whose file stands, whether it is up to date or not."""
        suffix = _SUFFIX[self.kind]
        stems = (n.removesuffix(suffix) for n in self.folder.names(self.path) if n.endswith(suffix))
        numbers = {int(s) for s in stems if s.isdigit()}
        # A task set has its own number of shards; a killed `--extend` may leave more shards of pairs than the manifest.
        return numbers if self.kind == "tasks" else {s for s in numbers if s < self.dataset.num_shards}

    def done(self) -> set[int]:
        """Shards whose file stands and was made from the pairs that stand now."""
        standing = self.standing()
        if self.kind not in ("scores", "features"):
            return standing
        pairs = self.dataset.stage(PAIRS)
        with_pairs = pairs.standing()
        late = self.stale({s: pairs.digest(s) for s in sorted(standing & with_pairs)})
        return (standing & with_pairs) - late

    def stale(self, digests: Mapping[int, str]) -> set[int]:
        """Of these shards, which stand, those that were made from other pairs.

        `digests`: those of the pairs shards that stand now. Scores that tell of the whole dataset are stale when any
        pairs shard has changed since.
        """
        footers = dict(zip(digests, self._footers(digests), strict=True))
        late = {s for s, one in footers.items() if one.get(DIGEST, b"").decode() != digests[s]}
        if any(WHOLE in one for one in footers.values()):
            unfinished = self.dataset.stage(PAIRS).pending()
            whole = b"" if unfinished else self.dataset.whole_digest().encode()
            late |= {s for s, one in footers.items() if one.get(WHOLE, whole) != whole}
        return late

    def pending(self, among: Sequence[int] | None = None) -> list[int]:
        """Shards that are still to do, in order."""
        done = self.done()
        return [s for s in (range(self.dataset.num_shards) if among is None else among) if s not in done]

    def footer(self, shard: int) -> dict[bytes, bytes]:
        """The metadata of the shard's file (Parquet footer or Arrow schema)."""
        from shards.reader import arrow_schema, parquet_footer

        read = arrow_schema if self.kind == "features" else parquet_footer
        return read(self.folder, self.file(shard))

    def digest(self, shard: int) -> str:
        """Hash of the pairs' (status, sha256) that this shard holds or was made from."""
        return self.footer(shard).get(DIGEST, b"").decode()

    def digests(self, shards: Iterable[int]) -> list[str]:
        """`digest` of each shard; on a store, where each is a request, several footers at a time."""
        return [footer.get(DIGEST, b"").decode() for footer in self._footers(shards)]

    def _footers(self, shards: Iterable[int]) -> list[dict[bytes, bytes]]:
        if self.folder.local is not None:
            return [self.footer(shard) for shard in shards]
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.footer, shards))

    def counts(self, shard: int) -> dict[str, int]:
        """Rows by status or state, as the shard's file tells them."""
        from shards.reader import stored_counts

        return stored_counts(self.folder, self.file(shard))
