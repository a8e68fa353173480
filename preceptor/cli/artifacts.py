"""``preceptor artifacts``: brings a folder to where students can be registered from, and looks whether it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.v1 import types_pb2


@click.group()
def artifacts() -> None:
    """Puts folders into a bucket (or another folder) and verifies them."""


@artifacts.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("url")
@click.option("--replace", is_flag=True, help="Also where other files lie; they are removed.")
@json_option
def put(folder: Path, url: str, replace: bool, as_json: bool) -> None:
    """Copies FOLDER to URL (s3://bucket/prefix or file:///path), whole or not at all.

    Hidden files are left out. Files of the same names are replaced.
    """
    from preceptor.artifacts import FolderStore, local_folder
    from preceptor.hashes import counts

    if url.startswith("s3://"):
        from preceptor.artifacts_s3 import S3Folder

        bucket = S3Folder(url)
        if not replace:
            _refuse_others(folder, url, filter(counts, bucket.files()))
        artifact = bucket.upload(folder)
    else:
        place = local_folder(url).resolve()
        if not replace:
            _refuse_others(folder, url, _names(place))

        def copy(draft: Path) -> None:
            shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(".*", "__pycache__"), dirs_exist_ok=True)

        artifact = FolderStore(place.parent).write_folder(place.name, copy)
    _print(artifact, as_json)


@artifacts.command()
@click.argument("url")
@click.option("--sha256", default="", help="What it is to be [default: what its own manifest says].")
@json_option
def verify(url: str, sha256: str, as_json: bool) -> None:
    """Reads all of what lies at URL and compares it with its hash."""
    from preceptor.artifacts import folder_sha256, local_folder
    from preceptor.errors import PreceptorError
    from preceptor.v1 import types_pb2

    if url.startswith("s3://"):
        from preceptor.artifacts_s3 import S3Folder

        found = S3Folder(url).verify()
    else:
        folder = local_folder(url)
        if not folder.is_dir():
            raise PreceptorError("ARTIFACT_NOT_FOUND", "there is no such folder", file=str(folder))
        found = folder_sha256(folder)
    if sha256 and found != sha256:
        raise PreceptorError("ARTIFACT_CORRUPT", f"has hash {found}, expected {sha256}", file=url)
    _print(types_pb2.Artifact(uri=url, sha256=found), as_json)


def _names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _refuse_others(folder: Path, url: str, there: Iterable[str]) -> None:
    """A folder takes the whole place: whoever names one too few would lose all that lies beside. Raises
    INVALID_REQUEST."""
    from preceptor.errors import PreceptorError

    mine = set(_names(folder))
    if (other := next((name for name in there if name not in mine), None)) is not None:
        raise PreceptorError(
            "INVALID_REQUEST",
            f"other files lie there, like {other}: give {folder.name} a place of its own, or say --replace to have "
            "them removed",
            file=url,
        )


def _print(artifact: types_pb2.Artifact, as_json: bool) -> None:
    from preceptor.cli.output import as_json_value, plain, print_json

    if as_json:
        print_json(as_json_value(artifact))
    else:
        print(plain(f"{artifact.uri}\n  sha256: {artifact.sha256}"))
