"""Configuration of a stage: one frozen pydantic model that flags and recipes both build."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import PairmillError, suggest

C = TypeVar("C", bound="StageConfig")
MAX_RECIPE_BYTES = 1 << 20


def identity(default: Any, description: str, **options: Any) -> Any:
    """A field that decides what the stage's rows are (model, weights, preprocessing, precision)."""
    return Field(default, description=description, json_schema_extra={"role": "identity"}, **options)


def execution(default: Any, description: str, **options: Any) -> Any:
    """A field that decides only how the stage runs (device, workers, batch size, selection)."""
    return Field(default, description=description, json_schema_extra={"role": "execution"}, **options)


class StageConfig(BaseModel):
    """Base of every stage's configuration. Unknown keys are errors; every field has a role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def roles(cls) -> dict[str, str]:
        """Field name -> 'identity' or 'execution'. A field without a role (a nested model) is identity."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {n: str(e.get("role", "identity")) if isinstance(e, dict) else "identity" for n, e in extras.items()}

    def identity_fields(self) -> dict[str, Any]:
        """The identity part as plain JSON values."""
        roles = self.roles()
        return {k: v for k, v in self.model_dump(mode="json").items() if roles[k] == "identity"}

    def execution_fields(self) -> dict[str, Any]:
        """The execution part as plain JSON values."""
        roles = self.roles()
        return {k: v for k, v in self.model_dump(mode="json").items() if roles[k] == "execution"}


def build_config(cls: type[C], values: dict[str, Any], where: str) -> C:
    """`cls(**values)`, with pydantic's complaints turned into one PairmillError that names `where`.

    Raises PairmillError: unknown key (with the nearest known one) or a value that does not fit.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            own = item.get("ctx", {}).get("error")  # of one of our own validators
            if item["type"] == "extra_forbidden":
                lines.append(f"unknown key `{name}`.{suggest(name, cls.model_fields)}")
            elif own and not isinstance(item["input"], str | int | float):  # fields together: it names them
                lines.append(f"`{name}`: {own}." if name else f"{own}.")
            else:
                lines.append(f"`{name}`: {own or item['msg']}, got {item['input']!r}.")
        raise PairmillError(f"{where}: " + " ".join(lines)) from None


def read_yaml(path: str | Path) -> Any:
    """What a recipe's file holds. Raises PairmillError: no such file, larger than 1 MiB, not YAML."""
    import yaml

    try:
        with Path(path).open("rb") as stream:
            text = stream.read(MAX_RECIPE_BYTES + 1)
        if len(text) > MAX_RECIPE_BYTES:
            raise PairmillError(f"{path} is larger than 1 MiB: not a recipe.")
        return yaml.safe_load(text)
    except OSError as error:
        raise PairmillError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise PairmillError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None


def fingerprint(fields: dict[str, Any]) -> str:
    """blake2b-128 (32 hex digits) of the fields as canonical JSON."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ShardStage(StageConfig):
    """What every stage that moves over shards lets the user choose about the run."""

    workers: int | None = execution(None, "worker processes; 0 runs in this process [default: the cores]", ge=0)
    scheduler: str | None = execution(None, "address of a Dask scheduler, tcp://HOST:PORT")
