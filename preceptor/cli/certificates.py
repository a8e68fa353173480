"""``preceptor certificates``: an authority of one's own and the folders for ``PRECEPTOR_TLS``, by OpenSSL's command."""

from __future__ import annotations

from pathlib import Path

import click

from preceptor.cli.output import json_option

# What compose.yaml calls its services, and how one machine calls itself.
HOSTS = (
    "localhost",
    "127.0.0.1",
    "teacher",
    "external-teacher",
    "student",
    "evaluator",
    "orchestrator",
    "worker",
    "redis",
    "postgres",
)
AUTHORITY_DAYS = 3650


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="house", show_default=True, help="Whose certificate: the folder FOLDER/NAME.")
@click.option("--host", "hosts", multiple=True, metavar="NAME_OR_IP",
              help=f"Under which clients reach it; several times [default: {', '.join(HOSTS)}].")  # fmt: skip
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it is valid.")
@json_option
def certificates(folder: Path, name: str, hosts: tuple[str, ...], days: int, as_json: bool) -> None:
    """Makes FOLDER/NAME with ca.pem, cert.pem and key.pem for PRECEPTOR_TLS.

    The authority is made at the first time, in FOLDER/authority; its key makes members, so keep it away from the
    services. The same command again makes a new certificate in place of the old one.
    """
    from preceptor.certificates import make_certificate
    from preceptor.cli.output import print_json

    made = make_certificate(folder, name, hosts or HOSTS, days, AUTHORITY_DAYS)
    if as_json:
        print_json({"tls": str(made), "authority": str(folder / "authority"), "hosts": list(hosts or HOSTS)})
        return
    print(f"made {made} for {', '.join(hosts or HOSTS)}, {days} days")
    print(f"set PRECEPTOR_TLS={made} for every service and client; keep {folder / 'authority'} away from them")
