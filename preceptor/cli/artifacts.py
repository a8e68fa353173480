"""``preceptor artifacts``: brings a folder to where students can be registered from, and looks whether it is whole."""

from __future__ import annotations

import shutil
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
@json_option
def put(folder: Path, url: str, as_json: bool) -> None:
    """Copies FOLDER to URL (s3://bucket/prefix or file:///path), whole or not at all.

    Hidden files are left out. What lay there before and differs is replaced.
    """
    from preceptor.artifacts import FolderStore, local_folder

    if url.startswith("s3://"):
        from preceptor.artifacts_s3 import S3Folder

        artifact = S3Folder(url).upload(folder)
    else:
        place = local_folder(url).resolve()

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


def _print(artifact: types_pb2.Artifact, as_json: bool) -> None:
    from preceptor.cli.output import as_json_value, plain, print_json

    if as_json:
        print_json(as_json_value(artifact))
    else:
        print(plain(f"{artifact.uri}\n  sha256: {artifact.sha256}"))
