"""URLs made clean without breaking them; addresses that are not for strangers to reach."""

import asyncio
import contextlib
import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from curation.address import AddressRule, GuardedResolver, clean_url, is_public, redirect_target
from curation.failures import BlockedAddressError, FetchError


@pytest.mark.parametrize(
    ("given_url", "requested"),
    [
        ("http://a.org", "http://a.org/"),
        ("HTTP://A.org:80/X", "http://a.org/X"),
        ("http://a.org:8080/X", "http://a.org:8080/X"),
        (" http://a.org/x y.jpg\n", "http://a.org/x%20y.jpg"),
        ("http://a.org/a,b;c=1(2)!$&'*+@~.jpg", "http://a.org/a,b;c=1(2)!$&'*+@~.jpg"),
        ("http://a.org/x%2Cy%2fz?s=%2B+", "http://a.org/x%2Cy%2fz?s=%2B+"),
        ("http://a.org/50%.jpg?q=100%", "http://a.org/50%25.jpg?q=100%25"),
        ("http://a.org/x#part", "http://a.org/x"),
        ("http://a.org?q=ü", "http://a.org/?q=%C3%BC"),
        ("http://münchen.de/ö", "http://xn--mnchen-3ya.de/%C3%B6"),
        ("http://例え.jp/", "http://xn--r8jz45g.jp/"),
        ("http://user:p%40ss@a.org/x", "http://user:p%40ss@a.org/x"),
        ("http://[2606:4700::1111]:8080/x", "http://[2606:4700::1111]:8080/x"),
        ('http://a.org/"<x>"', "http://a.org/%22%3Cx%3E%22"),
    ],
)
def test_clean_url(given_url, requested):
    assert str(clean_url(given_url)) == requested


@pytest.mark.parametrize(
    "wrong",
    [
        None, "", "   ", "a.org/x.jpg", "//a.org/x", "ftp://a.org/", "javascript:alert(1)", "file:///etc/passwd",
        "http://", "http://:80/", "http://a.org:x/", "http://a.org:99999/", "http://a.org:0/", "http://[::1/",
        "http://[zz]/", "http://1.2.3/", "http://2130706433/", "http://0177.0.0.1/", "http://1.2.3.4.5/",
        "http://evil.org\\@good.org/", "http://a b.org/",
    ],
)  # fmt: skip
def test_bad_urls(wrong):
    with pytest.raises(FetchError) as caught:
        clean_url(wrong)
    assert caught.value.status == "bad_url"


@given(st.text())
def test_any_text_is_refused_or_a_url_in_ascii(text):
    for candidate in (text, "http://a.org/" + text, "http://" + text):
        with contextlib.suppress(FetchError):
            url = clean_url(candidate)
            assert str(url).isascii()
            assert url.raw_host
            assert " " not in str(url)
            assert clean_url(str(url)) == url


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
        "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
        "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
        "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_rule_allows_names_addresses_and_networks():
    rule = AddressRule(["mirror.lan", "10.1.0.0/16", "::1"])
    assert rule.permits("MIRROR.lan", "192.168.0.1")
    assert rule.permits("10.1.2.3", "10.1.2.3")
    assert rule.permits("::1", "::1")
    assert not rule.permits("other.lan", "192.168.0.1")
    assert not rule.permits("x", "10.2.0.1")
    assert not rule.permits("x", "fe80::1%eth0")
    rule.check_literal("any.name.passes")
    for literal in ("192.168.0.1", "fe80::1"):
        with pytest.raises(FetchError, match="blocked"):
            rule.check_literal(literal)


def resolved(monkeypatch, rule: AddressRule, *addresses: str) -> list[str]:
    def lookup(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    async def go():
        resolver = GuardedResolver(rule, 1.0)
        try:
            return [answer["host"] for answer in await resolver.resolve("name.test", 80)]
        finally:
            await resolver.close()

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return asyncio.run(go())


def test_resolver_hands_out_permitted_addresses_only(monkeypatch):
    rule = AddressRule()
    assert resolved(monkeypatch, rule, "10.0.0.1", "8.8.8.8", "127.0.0.1", "8.8.8.8") == ["8.8.8.8"]
    with pytest.raises(BlockedAddressError):
        resolved(monkeypatch, rule, "10.0.0.1", "127.0.0.1")
    assert resolved(monkeypatch, AddressRule(["name.test"]), "10.0.0.1") == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/x", "http://a.org/x"),
        ("y?z=1", "http://a.org/dir/y?z=1"),
        ("//b.org/x", "http://b.org/x"),
        ("https://b.org", "https://b.org/"),
        ("?q", "http://a.org/dir/page?q"),
    ],
)
def test_redirect_target(location, target):
    assert redirect_target(URL("http://a.org/dir/page"), location) == URL(target)


@pytest.mark.parametrize(
    ("location", "status"),
    [
        (None, "redirect_error"),
        (" ", "redirect_error"),
        ("http://[::x/", "redirect_error"),
        ("http://a.org:x/", "redirect_error"),
        ("file:///etc/passwd", "blocked"),
        ("javascript:1", "blocked"),
        ("gopher://x/", "blocked"),
    ],
)
def test_redirects_that_lead_nowhere(location, status):
    with pytest.raises(FetchError) as caught:
        redirect_target(URL("http://a.org/dir/page"), location)
    assert caught.value.status == status
