"""Credentials in addresses: taken out of what is shown, and there for who fetches."""

import os

import pytest

from wads_dist.shards.addresses import (
    VARIABLE,
    address_problem,
    is_remote,
    looks_like_address,
    public,
    take_credentials,
    with_credentials,
    without_addresses,
)


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
    ("http://host/a,https://alice:s3cr3t@host", None),
    ("http://host:80/a@b", "http://host:80/a@b"),
    ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
]


@pytest.mark.parametrize(("address", "shown"), ADDRESSES)
def test_an_address_without_its_credentials(address: str, shown: str | None) -> None:
    text = public(f'data = "{address}": not found')
    assert "s3c" not in text and "3t" not in text and "alice" not in text
    if shown is not None:
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


NOT_HTTP = [
    *(
        "s3://bucket/a?b#c",
        "abfs://container@account.dfs.core.windows.net/x",
        "sftp://deploy@host:22/a b@c",
        "gs://b/x:y",
    ),
    *("s3://bucket/a@b", "az://container/?x", 's3://bucket/"a"'),
]


@pytest.mark.parametrize("address", NOT_HTTP)
def test_what_is_a_part_of_the_place_stays_with_it(address: str) -> None:
    """Only http(s) has users that are secrets, and queries; a key of s3 may hold any character."""
    assert address_problem(address) is None and is_remote(address)
    assert public(f"{address}: not found") == f"{address}: not found"
    assert take_credentials(address) == with_credentials(address) == address and os.environ[VARIABLE] == ""


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "abfs", "sftp", "S3"])
@pytest.mark.parametrize(
    "user", ["alice:s3cr3t@", "alice:s3c/r3t@", "alice@corp:s3cr3t@", "alice:s3c@r3t@", ":s3cr3t@"]
)
def test_a_password_in_an_address_that_is_not_http_is_refused(
    scheme: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver takes it for a part of the bucket's name, and says so in its errors."""
    address = f"{scheme}://{user}bucket/x"
    problem = address_problem(address)
    assert problem and "not in the address" in problem and "s3c" not in problem and "alice" not in problem
    assert public(f"no {address}") == f"no {scheme}://bucket/x" and "s3c" not in take_credentials(address)
    monkeypatch.setenv(VARIABLE, address)  # by hand
    assert with_credentials(f"{scheme}://bucket/x") == f"{scheme}://bucket/x"


REFUSED = [
    *("http://alice:s3 cr3t@host", "http://alice:s3\ncr3t@host", "http://host/\x1b[2J", 'http://h/x?sig="s3cr3t"'),
    *('http://alice:"s3cr3t"@h', "http://h/x?sig=<s3cr3t>", "simplecache::https://alice:s3cr3t@h/x"),
    *(
        "https:/alice:s3cr3t@h",
        "zip://a.zip::https://alice:s3cr3t@h/x",
        "S3:/alice:s3cr3t@h",
        "file://alice:s3cr3t@h/x",
    ),
    *("simplecache::s3://bucket/x", "simplecache::s3:/bucket/x", " http://alice:s3cr3t@h", "\nhttp://alice:s3 cr3t@h"),
]


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_that_cannot_be_one_is_refused_without_being_shown(address: str) -> None:
    problem = address_problem(address)
    assert (
        problem and "s3 " not in problem and "cr3t" not in problem and "\x1b" not in problem and "alice" not in problem
    )


@pytest.mark.parametrize("address", REFUSED)
def test_of_an_address_where_none_belongs_the_scheme_is_shown(address: str) -> None:
    """It may hold what no address holds, so that nobody knows where it ends."""
    assert looks_like_address(address) or address_problem(address)
    for text in (address, repr(address), repr(["x", address]), f"--root {address}: y"):
        shown = without_addresses(text)
        assert shown.endswith(":/… (an address)") or shown.endswith("://… (an address)")
        assert not any(secret in shown for secret in ("alice", "s3c", "s3 ", "cr3t", "host"))
    assert without_addresses("a/b: no folder") == "a/b: no folder"


@pytest.mark.parametrize("folder", ["a::b", "/a:/b", "x/y:/z", "C:/x", "::", "a: /b", "/s3://x"])
def test_a_folder_may_hold_colons(folder: str) -> None:
    assert address_problem(folder) is None and not is_remote(folder)


def test_a_long_text_is_looked_through_once() -> None:
    text = "a" * 300_000
    assert public(f"{text} http://{text}/https://alice:s3cr3t@h") == f"{text} http://{text}/https://h"
