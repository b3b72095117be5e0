"""`sidecar.json` and `dataset.json`: what a folder of shards is. No times, hosts or paths."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.config import StageConfig, fingerprint
from schemas.errors import PairmillError

FORMAT = "pairmill-dataset"
FORMAT_VERSION = 1


class ListSource(BaseModel):
    """A list the dataset came from."""

    model_config = ConfigDict(frozen=True)
    name: str
    bytes: int
    hash: str = Field(description="blake2b-128 of the file as it lay there")
    shards: int = Field(description="how many shards begin in it")
    cut: dict[str, Any] = Field(default_factory=dict, description="the cut's choices that were not the defaults")


class Manifest(BaseModel):
    """`dataset.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: str = FORMAT
    version: int = FORMAT_VERSION
    shard_width: int = 5
    shard_rows: int = Field(description="rows a full shard has")
    shards: tuple[int, ...] = Field(description="row count of each shard")
    lists: tuple[ListSource, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict, description="carried column -> name in the list")


class Sidecar(BaseModel):
    """`sidecar.json`: written before a stage's first shard, never again."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    name: str
    schema_name: str
    schema_version: int
    identity: dict[str, Any]
    recorded: dict[str, Any] = Field(default_factory=dict, description="choices a rerun keeps, such as the batch size")
    fingerprint: str
    columns: dict[str, dict[str, Any]] = Field(default_factory=dict, description="provenance and scale of each column")
    versions: dict[str, str] = Field(default_factory=dict)


def make_sidecar(
    stage: str,
    name: str,
    schema: tuple[str, int],
    config: StageConfig,
    extra_identity: dict[str, Any] | None = None,
    columns: dict[str, dict[str, Any]] | None = None,
    versions: dict[str, str] | None = None,
    recorded: dict[str, Any] | None = None,
) -> Sidecar:
    """The sidecar of a stage. `extra_identity` holds what the config cannot know (weights' sha256)."""
    identity = {**config.identity_fields(), **(extra_identity or {})}
    return Sidecar(
        stage=stage,
        name=name,
        schema_name=schema[0],
        schema_version=schema[1],
        identity=identity,
        fingerprint=fingerprint({"stage": stage, "schema": list(schema), **identity}),
        columns=columns or {},
        versions=versions or {},
        recorded=recorded or {},
    )


def check_same(old: Sidecar, new: Sidecar, where: str, mend: str) -> None:
    """Raises PairmillError that names every difference when `where` holds rows of another identity."""
    if old.fingerprint == new.fingerprint:
        return
    keys = sorted({*old.identity, *new.identity})
    parts = [
        f"`{k}` was {old.identity.get(k)!r}, now {new.identity.get(k)!r}"
        for k in keys
        if old.identity.get(k) != new.identity.get(k)
    ] or [f"schema was {old.schema_name} {old.schema_version}, now {new.schema_name} {new.schema_version}"]
    raise PairmillError(f"{where} was made with other settings: {'; '.join(parts)}. Nothing written. {mend}")
