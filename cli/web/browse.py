"""The application behind `pairmill browse`: a few routes over curation.browse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cli.web.files import page_files
from cli.web.security import Guard
from curation.browse import PAGE, View
from curation.browse_config import MAX_TEXT, BrowseConfig, Query, parse_query
from curation.browse_rows import Pictures, region_sets, row_boxes, row_values
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from shards.dataset import Dataset
from shards.select import selections

FILES = ("browse.html", "browse.css", "browse.js", "icon.svg")
_DAY = {"cache-control": "private, max-age=3600"}
BROKEN = page_files("broken.svg")["broken.svg"]
_PAGING = ("after", "limit", "counts", "histogram")


class Saving(BaseModel):
    """What `save selection` sends: `query` is the part of the page's address after the question mark."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=100)
    query: str = Field("", max_length=100 * MAX_TEXT)
    replace: bool = False


class Opened:
    """The dataset as it stands; looked at again when the page is loaded, for stages may have come."""

    def __init__(self, url: str, config: BrowseConfig, emit: Emit) -> None:
        self.url, self.config, self.emit = url, config, emit
        self._one = threading.Lock()
        self._tower_one = threading.Lock()
        self._signature: object = None
        self._label: str | None = None
        self._look()

    def _look(self) -> None:
        dataset = Dataset.open(self.url)
        signature = _signature(dataset)
        if signature == self._signature:
            return
        self.view = View(dataset, self.config.memory << 20)
        self.pictures = Pictures(dataset)
        self.regions = region_sets(dataset)
        self._signature, self._tried = signature, False

    def look_again(self) -> None:
        """Opens the dataset anew where a stage has come or grown."""
        with self._one:
            self._look()

    def model(self) -> str | None:
        """The label of the CLIP that can be asked with words, loaded at the first call; None where there is none."""
        with self._tower_one:
            view = self.view
            if not self._tried:
                try:
                    self._label = view.find_model(self.config.model, self.config.pretrained)
                except PairmillError as error:
                    self._label = None
                    self.emit(Notice(str(error), warning=True))
                self._tried = True
            return self._label


def _signature(dataset: Dataset) -> object:
    stages = [(s.path, str(s.sidecar()), len(s.standing())) for s in dataset.stages()]
    return (dataset.manifest.model_dump_json(), stages)


def create_app(url: str, config: BrowseConfig, emit: Emit = silent) -> Guard:
    """The guarded application for one dataset. Raises PairmillError where it cannot be opened."""
    opened = Opened(url, config, emit)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.exception_handler(PairmillError)(_told)
    app.exception_handler(RequestValidationError)(_malformed)
    _add_files(app)
    _add_rows(app, opened)
    _add_selections(app, opened)
    return Guard(app, config.host, config.allow_host)


async def _told(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _malformed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": "That is not what this page asks for."}, 400)


def _add_files(app: FastAPI) -> None:
    files = page_files(*FILES)

    def serve(name: str) -> Callable[[], Response]:
        data, kind = files[name]
        return lambda: Response(data, media_type=kind)

    for name in files:
        path = "/" if name == "browse.html" else f"/{name}"
        app.add_api_route(path, serve(name), methods=["GET"], response_class=Response)


def _query(request: Request, opened: Opened) -> tuple[Query, dict[str, list[str]]]:
    """The query of an address, and what it says about paging. One with words for pictures has the model loaded."""
    pairs = parse_qsl(request.url.query, keep_blank_values=True, max_num_fields=500)
    paging: dict[str, list[str]] = {}
    for name, value in pairs:
        if name in _PAGING:
            paging.setdefault(name, []).append(value)
    query = parse_query([(n, v) for n, v in pairs if n not in _PAGING])
    if query.see:
        opened.model()
    return query, paging


def _whole(paging: dict[str, list[str]], name: str, default: int | None) -> int | None:
    text = paging.get(name, [""])[0]
    if not text:
        return default
    if not text.isdigit() or len(text) > 12:
        raise PairmillError(f"`{name}={text}` is no whole number.")
    return int(text)


def _add_rows(app: FastAPI, opened: Opened) -> None:
    @app.get("/api/about")
    def about() -> dict[str, Any]:
        opened.look_again()
        view = opened.view
        return {
            "dataset": PurePosixPath(view.dataset.url).name,
            "rows": view.rows,
            "shards": view.dataset.num_shards,
            "numbers": view.columns.numbers,
            "facets": view.columns.facets,
            "unfinished": view.columns.unfinished,
            "selections": selections(view.dataset),
            "embeddings": [s.name for s in view.sets],
            "regions": [s.name for s in opened.regions],
            "twins": view.twins is not None,
        }

    @app.get("/api/model")
    def model() -> dict[str, str | None]:
        return {"model": opened.model()}

    @app.get("/api/rows")
    def rows(request: Request) -> dict[str, Any]:
        query, paging = _query(request, opened)
        view = opened.view
        found = view.search(query, _whole(paging, "after", None), _whole(paging, "limit", PAGE) or PAGE)
        answer = {
            "total": found.total,
            "keepable": found.keepable,
            "rows": view.cards(found),
            "next": found.next,
        }
        if "counts" in paging:
            answer["counts"] = view.counts(query, paging.get("histogram", []))
        return answer

    @app.get("/api/rows/{row}")
    def one(row: int) -> dict[str, Any]:
        view = opened.view
        view.check_row(row)
        shard, at = view.dataset.locate(str(row))
        return {
            "number": row,
            "shard": shard,
            "row": at,
            "values": row_values(view.dataset, row),
            "regions": row_boxes(opened.regions, row),
        }

    @app.get("/thumbnails/{row}", response_class=Response)
    def thumbnail(row: int) -> Response:
        opened.view.check_row(row)
        return _jpeg(opened.pictures.thumbnail(row))

    @app.get("/images/{row}", response_class=Response)
    def image(row: int) -> Response:
        opened.view.check_row(row)
        return _jpeg(opened.pictures.large(row))


def _jpeg(data: bytes | None) -> Response:
    """The picture; a sign where there is none that decodes: a 404 would be an error in the browser's console."""
    if data is None:
        sign, kind = BROKEN
        return Response(sign, media_type=kind)
    return Response(data, media_type="image/jpeg", headers=_DAY)


def _add_selections(app: FastAPI, opened: Opened) -> None:
    @app.get("/api/recipe")
    def recipe(request: Request) -> dict[str, str]:
        query, _ = _query(request, opened)
        made = opened.view.recipe(query)
        return {"yaml": made.as_yaml(PurePosixPath(opened.view.dataset.url).name)}

    @app.post("/api/selections")
    def save(wanted: Saving) -> dict[str, Any]:
        pairs = parse_qsl(wanted.query, keep_blank_values=True, max_num_fields=500)
        done = opened.view.save(wanted.name, parse_query(pairs), wanted.replace)
        return {"name": wanted.name, "kept": done.kept, "rows": done.rows}
