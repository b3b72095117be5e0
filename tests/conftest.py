"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.browser import Browser, find_chromium

settings.register_profile("few", max_examples=25, deadline=None)
settings.register_profile("many", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 protocol server on loopback; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def s3_url(s3_server: str, tmp_path, monkeypatch) -> Iterator[str]:
    """`s3://BUCKET/data` of an empty bucket. Processes started meanwhile reach it too; the cache is the test's own."""
    import fsspec
    import s3fs

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_server, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PAIRMILL_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    yield f"s3://{bucket}/data"
    s3fs.S3FileSystem.clear_instance_cache()
    assert os.environ["AWS_ENDPOINT_URL"] == s3_server


@pytest.fixture(scope="session")
def _chromium_process() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set CHROMIUM to its path")
    with Browser(path) as browser:
        yield browser


@pytest.fixture
def chromium(_chromium_process: Browser) -> Browser:
    """A headless Chromium, one process for all tests; `chromium.page()` gives a page without a past."""
    return _chromium_process
