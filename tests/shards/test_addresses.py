"""Credentials in addresses: taken out of what is shown, and there for who fetches."""

import pytest

from shards.addresses import VARIABLE, address_problem, is_remote, public, take_credentials, with_credentials


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


ADDRESSES = [
    ("http://alice:s3cr3t@host:80/a/b", "http://host:80/a/b"),
    ("HTTPS://s3cr3t@host", "https://host"),
    ("https://host/a/?sig=s3cr3t&se=2030", "https://host/a"),
    ("https://alice:s3cr3t@host/a@b?x=s3cr3t#s3cr3t", "https://host/a@b"),
    ("http://alice:s3cr/3t@host/a", "http://host/a"),
    ("http://alice:s3cr?3t@host/a", "http://host/a"),
    ("http://alice:@s3cr3t@host/a", "http://host/a"),
    ("s3://key:s3cr3t@bucket/a b", "s3://bucket/a b"),
    ("http://host:80/a@b", "http://host:80/a@b"),
    ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
]


@pytest.mark.parametrize(("address", "shown"), ADDRESSES)
def test_an_address_without_its_credentials(address: str, shown: str) -> None:
    text = public(f'data = "{address}": not found')
    assert "s3c" not in text and "3t" not in text and "alice" not in text
    if " " not in address:
        assert take_credentials(address) == shown
        assert "s3c" not in public(repr([address, 1])) and public(shown) == shown


@pytest.mark.parametrize("folder", ["/data/a@b?c", "shards", "file:///x@y?z", "C:x@y"])
def test_a_folder_is_no_address(folder: str) -> None:
    assert not is_remote(folder) and take_credentials(folder) == folder and address_problem(folder) is None


def test_who_fetches_has_them_for_the_host_and_the_nearest_path() -> None:
    take_credentials("https://alice:a@host/one")
    take_credentials("https://bob:b@host/one/two")
    take_credentials("https://host/three?sig=c")
    assert with_credentials("https://host/one/nut/x.tar") == "https://alice:a@host/one/nut/x.tar"
    assert with_credentials("https://host/one/two/x.tar") == "https://bob:b@host/one/two/x.tar"
    assert with_credentials("https://host/three/x.tar") == "https://host/three/x.tar?sig=c"
    for other in (
        "https://other/one/x",
        "http://host/one/x",
        "https://host:444/one/x",
        "https://hostile/one/x",
        "/one/x",
    ):
        assert with_credentials(other) == other


def test_the_same_command_gives_them_again() -> None:
    take_credentials("https://alice:old@host/one")
    take_credentials("https://alice:new@host/one/")
    assert with_credentials("https://host/one/x") == "https://alice:new@host/one/x"


@pytest.mark.parametrize("address", ["http://alice:s3 cr3t@host", "http://alice:s3\ncr3t@host", "http://host/\x1b[2J"])
def test_an_address_that_cannot_be_one_is_refused_without_being_shown(address: str) -> None:
    problem = address_problem(address)
    assert problem and "s3" not in problem and "\x1b" not in problem
