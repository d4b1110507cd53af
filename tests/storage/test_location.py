"""Tests what `store=` may name: folders, and URIs without a secret.

All other values are refused before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.storage.store import ArtifactStore
from serve_app import deploy
from tg_tinker.client import service
from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.stores import Location, parse

SECRET = "hunter2-XYZ"


@pytest.mark.parametrize(
    ("root", "place"),
    [
        ("some/folder", Path.cwd() / "some/folder"),
        ("~/folder", Path.home() / "folder"),
        ("/x/a b", Path("/x/a b")),
        ("C:/x", Path.cwd() / "C:/x"),
        ("./s3:x", Path.cwd() / "s3:x"),
        ("a/b:c", Path.cwd() / "a/b:c"),
        ("/a:b", Path("/a:b")),
        ("file:///x/a%20b", Path("/x/a b")),
        ("file://localhost/x", Path("/x")),
        ("s3://bucket", Location("s3", "bucket", "", 0, "")),
        ("s3://bucket/", Location("s3", "bucket", "", 0, "")),
        ("s3://my.bucket/a/b/", Location("s3", "my.bucket", "", 0, "a/b")),
        ("gs://b/a", Location("gs", "b", "", 0, "a")),
        (
            "abfss://box@acct.dfs.core.windows.net/a",
            Location("abfss", "box", "acct.dfs.core.windows.net", 0, "a"),
        ),
        ("hdfs://node:8020/a", Location("hdfs", "", "node", 8020, "a")),
        ("hdfs:///a", Location("hdfs", "", "", 0, "a")),
    ],
)
def test_what_a_root_means(root: str, place: Path | Location) -> None:
    assert parse(root) == place


def test_paths_of_hdfs_are_absolute_and_others_begin_with_the_bucket() -> None:
    roots = ["hdfs://node/a/b", "hdfs:///", "s3://bucket/a", "s3://bucket"]
    assert [parse(root).root for root in roots] == ["/a/b", "/", "bucket/a", "bucket"]


@pytest.mark.parametrize(
    "root",
    [
        f"s3://user:{SECRET}@bucket/prefix",
        f"s3://{SECRET}@bucket/prefix",
        f"s3://bucket/prefix?secret_key={SECRET}",
        f"s3://bucket?x={SECRET}",
        f"s3://bucket#{SECRET}",
        f"s3://bucket:{SECRET}/prefix",
        f"gs://user:{SECRET}@bucket/prefix",
        f"gs://bucket/prefix?access_token={SECRET}",
        f"abfss://box:{SECRET}@acct.dfs.core.windows.net/prefix",
        f"abfss://box@acct.dfs.core.windows.net/prefix?sig={SECRET}",
        f"abfss://acct.blob.core.windows.net/{SECRET}",
        f"hdfs://{SECRET}@node:8020/prefix",
        f"hdfs://node:8020/prefix?user={SECRET}",
        f"file:///x?{SECRET}",
        f"file://{SECRET}@localhost/x",
        f"file:/x/{SECRET}",
        f"s3:/bucket/{SECRET}",
        f"https://bucket.example/{SECRET}",
        f"S3://bucket/{SECRET}",
        f"s3:///{SECRET}",
        f"s3://bucket/../{SECRET}",
        f"s3://bucket//{SECRET}",
        f"s3://bucket/a%2f{SECRET}",
        f"s3://bucket/a\n{SECRET}",
        f"s3://bucket\n{SECRET}",
        f"/x\x1b]0;{SECRET}",
        f"file:///x%1b{SECRET}",
        f"file:///x/a\n{SECRET}",
        f"file:///x/%ff{SECRET}",
        f"file:///x/{SECRET}%20",
        f"s3:{SECRET}",
        f"user:{SECRET}@host/p",
        f"host:9000/{SECRET}",
        f"user@host:{SECRET}",
        f" s3://bucket/{SECRET}",
        f"s3://bucket/{SECRET} ",
        f" /x/{SECRET}",
        f"/x/{SECRET}\t",
        f"file:{SECRET}",
    ],
)
def test_a_uri_with_a_secret_or_of_another_form_is_refused_and_not_repeated(root: str) -> None:
    with pytest.raises(InvalidRequestError, match="credentials come from the environment") as info:
        ArtifactStore(root)
    assert SECRET not in str(info.value)
    assert info.value.details == {}


def test_a_folder_of_an_unknown_user_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidRequestError, match="knows no home of this user") as info:
        ArtifactStore(f"~nobody-of-this-name/{SECRET}")
    assert SECRET not in str(info.value)
    assert info.value.__context__ is None


def test_what_looks_like_a_uri_and_is_meant_as_a_folder_is_told_how_to_say_so() -> None:
    with pytest.raises(InvalidRequestError, match=r"blanks at its ends.*colon.* with \./"):
        parse("s3:bucket")


def test_the_sdk_refuses_such_a_uri_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*arguments: Any) -> None:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(service, "Cluster", started)
    with pytest.raises(InvalidRequestError, match="credentials come from") as info:
        service.ServiceClient(store=f"s3://key:{SECRET}@bucket/prefix")
    assert SECRET not in str(info.value)
    with pytest.raises(AssertionError, match="was asked for"):
        service.ServiceClient(store="s3://bucket/prefix")


def test_a_store_in_a_file_for_serve_is_checked_before_a_registry_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(deploy, "actors_backend", lambda: pytest.fail("a registry was started"))
    settings = deploy.Settings(model_ref="m", home=str(tmp_path), store=f"s3://k:{SECRET}@b/p")
    with pytest.raises(InvalidRequestError, match="credentials come from") as info:
        deploy.app(settings)
    assert SECRET not in str(info.value)
