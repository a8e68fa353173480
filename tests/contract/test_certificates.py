"""``preceptor certificates``: what it makes serves, and is nobody else's to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.errors import PreceptorError
from preceptor.security import load_security
from preceptor.settings import SecuritySettings
from tests.contract.test_security import Service, needs_openssl, refused, served

__all__ = ["served"]  # a fixture


@needs_openssl
def test_what_it_makes_serves_and_its_keys_are_their_owners(
    tmp_path: Path, served: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tls"
    assert main(["certificates", str(folder)]) == 0
    assert f"set PRECEPTOR_TLS={folder / 'house'}" in capsys.readouterr().out
    assert main(["certificates", str(folder), "--name", "laptop", "--host", "laptop", "--json"]) == 0
    laptop = Path(json.loads(capsys.readouterr().out)["tls"])
    assert sorted(path.name for path in folder.iterdir()) == ["authority", "house", "laptop"]
    assert sorted(path.name for path in laptop.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    for key in (folder / "authority" / "ca-key.pem", folder / "house" / "key.pem", laptop / "key.pem"):
        assert key.stat().st_mode & 0o077 == 0
    service = served(tls=folder / "house")
    security = load_security(SecuritySettings(tls=laptop))
    assert service.ask(security) == "x"
    assert service.ask(security, host="localhost") == "x"
    # One for another name does not serve here.
    elsewhere = served(tls=laptop)
    assert "does not name 127.0.0.1" in refused(elsewhere, security)


@needs_openssl
def test_a_new_certificate_takes_the_place_of_the_old_one_under_the_same_authority(
    tmp_path: Path, served: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certificates", str(tmp_path), "--host", "127.0.0.1", "--host", "::1", "--host", "*.example.org"]) == 0
    before = {name: (tmp_path / "house" / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")}
    service = served(tls=tmp_path / "house")
    assert main(["certificates", str(tmp_path)]) == 0
    after = {name: (tmp_path / "house" / name).read_bytes() for name in before}
    assert after["ca.pem"] == before["ca.pem"]
    assert after["cert.pem"] != before["cert.pem"]
    assert after["key.pem"] != before["key.pem"]
    load_security.__globals__["_load"].cache_clear()  # as a new process reads it
    assert service.ask(load_security(SecuritySettings(tls=tmp_path / "house"))) == "x"


@needs_openssl
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "two words"], "'two words' is no host name"),
        (["--host", "a,DNS:b"], "is no host name"),
        (["--host", ""], "is no host name"),
        (["--name", "../x"], "cannot be the name"),
        (["--name", "authority"], "cannot be the name"),
    ],
)
def test_what_is_no_name_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["certificates", str(tmp_path / "tls"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "tls").exists()


def test_without_openssl_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["certificates", str(tmp_path / "tls")]) == 2
    assert "the command openssl is needed" in capsys.readouterr().err


@needs_openssl
def test_a_broken_authority_is_told_in_openssls_words(tmp_path: Path) -> None:
    from preceptor.certificates import make_certificate

    make_certificate(tmp_path, "house", ["localhost"], 1, 1)
    (tmp_path / "authority" / "ca-key.pem").write_text("no key")
    with pytest.raises(PreceptorError, match="openssl x509 fails"):
        make_certificate(tmp_path, "house", ["localhost"], 1, 1)
    load_security(SecuritySettings(tls=tmp_path / "house"))  # the old one is still there
