"""A year and more of certificates in virtual time: whoever holds what was current lately is trusted, all the time."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from nomad.kubernetes.certs import (
    BACKDATED,
    CA_LIFE,
    LEAF_LIFE,
    OVERLAP,
    Authority,
    Held,
    Leaf,
    new_ca,
    new_leaf,
    renewed,
)
from nomad.transport.certificates import MASTER, POD, Identity

START = datetime(2030, 1, 1, tzinfo=UTC)
ROLES = (MASTER, POD)
BEHIND = timedelta(hours=12)
"""How old may be what a process has."""


def trusts(one: Leaf, other: Leaf, now: datetime) -> bool:
    """Whether the holder of `one` takes a connection from the holder of `other`."""
    store = Store(x509.load_pem_x509_certificates(one.authorities))
    try:
        leaf = x509.load_pem_x509_certificate(other.own.certificate)
        PolicyBuilder().store(store).time(now).build_client_verifier().verify(leaf, [])
    except VerificationError:
        return False
    return True


def published(held: Held, now: datetime) -> Held:
    """As `nomad.kubernetes.certificates` notes it once everybody's file has the next CA."""
    authority = held.authority
    assert authority is not None
    if authority.next is not None and authority.published is None:
        return replace(held, authority=replace(authority, published=now))
    return held


def life(days: int, rng: Random, away: Iterator[bool] | None = None) -> Iterator[tuple[datetime, Held]]:
    """All that there is, at every look, hours apart."""
    held, now = Held(), START
    while now < START + timedelta(days=days):
        held = published(renewed(held, "test", ROLES, now), now)
        yield now, held
        now += timedelta(hours=rng.uniform(1, 6))


def serials(bundle: bytes) -> list[int]:
    return [certificate.serial_number for certificate in x509.load_pem_x509_certificates(bundle)]


@pytest.mark.slow
def test_two_years_of_mutual_trust() -> None:
    rng = Random(1)
    recent: list[tuple[datetime, Leaf]] = []
    cas, leaves, most = set(), set(), 0
    for now, held in life(2 * 365 + 60, rng):
        recent = [(at, leaf) for at, leaf in recent if at > now - BEHIND]
        recent += [(now, leaf) for leaf in held.leaves.values()]
        for _ in range(3):
            (_, one), (_, other) = rng.choice(recent), rng.choice(recent)
            assert trusts(one, other, now), f"at {now}"
        for leaf in held.leaves.values():
            assert trusts(leaf, leaf, now)
            leaves.add(leaf.own.certificate)
        assert held.authority is not None
        cas.add(held.authority.signing.certificate)
        most = max(most, len(serials(held.authority.bundle)))
        before, _ = recent[0]
    assert len(cas) == 4, "one to begin with, and a new one after each 250 days"
    assert most == 2, "CAs that nothing depends on stay around"
    assert len(leaves) > 2 * 790 / 5


def test_a_leaf_never_outlives_its_ca() -> None:
    for now, held in life(300, Random(2)):
        for leaf in held.leaves.values():
            own = x509.load_pem_x509_certificate(leaf.own.certificate)
            issuers = [
                ca
                for ca in x509.load_pem_x509_certificates(leaf.authorities)
                if ca.subject == own.issuer and ca.not_valid_after_utc >= own.not_valid_after_utc > now
            ]
            assert len(issuers) == 1


def test_a_next_ca_that_was_not_published_does_not_sign() -> None:
    """A master that died between the two writes doesn't cut its pods off, however long it was away."""
    now = START
    held = renewed(Held(), "test", ROLES, now)
    now += CA_LIFE * 2 / 3 + timedelta(minutes=1)
    later = renewed(held, "test", ROLES, now)
    assert later.authority is not None
    assert later.authority.next is not None
    lost = replace(later, leaves=held.leaves)  # the leaves weren't written any more
    now += OVERLAP * 3
    again = renewed(lost, "test", ROLES, now)
    assert again.authority is not None
    assert again.authority.signing == later.authority.signing
    assert all(serials(leaf.authorities) == serials(later.authority.bundle) for leaf in again.leaves.values())
    done = published(again, now)
    switched = renewed(done, "test", ROLES, now + OVERLAP)
    assert switched.authority is not None
    assert switched.authority.signing == later.authority.next
    ended = renewed(switched, "test", ROLES, now + OVERLAP + LEAF_LIFE)
    assert ended.authority is not None
    assert ended.authority.former == ()


def test_nothing_is_due_most_of_the_time() -> None:
    held = renewed(Held(), "test", ROLES, START)
    assert renewed(held, "test", ROLES, START + LEAF_LIFE / 2) is held
    assert renewed(held, "test", ROLES, START + LEAF_LIFE * 0.7) is not held


def test_a_master_that_was_away_for_years_begins_anew() -> None:
    held = renewed(Held(), "test", ROLES, START)
    now = START + CA_LIFE * 3
    again = renewed(held, "test", ROLES, now)
    assert trusts(again.leaves[POD], again.leaves[MASTER], now)
    assert held.authority is not None
    assert again.authority is not None
    assert again.authority.signing != held.authority.signing


@pytest.mark.parametrize("damage", ["certificate", "key", "foreign", "role"])
def test_what_somebody_spoilt_is_made_again(damage: str) -> None:
    held = renewed(Held(), "test", ROLES, START)
    assert held.authority is not None
    leaf = held.leaves[POD]
    own = {
        "certificate": replace(leaf.own, certificate=b"nonsense"),
        "key": replace(leaf.own, key=held.leaves[MASTER].own.key),
        "foreign": new_leaf(new_ca("test", START), Identity("test", POD), START),
        "role": new_leaf(held.authority.signing, Identity("test", MASTER), START),
    }[damage]
    spoilt = replace(held, leaves={**held.leaves, POD: replace(leaf, own=own)})
    again = renewed(spoilt, "test", ROLES, START)
    assert trusts(again.leaves[MASTER], again.leaves[POD], START)
    assert again.leaves[MASTER] is held.leaves[MASTER]


def test_a_ca_whose_key_was_lost_is_replaced() -> None:
    held = renewed(Held(), "test", ROLES, START)
    assert held.authority is not None
    broken = replace(held, authority=Authority(replace(held.authority.signing, key=b"")))
    again = renewed(broken, "test", ROLES, START)
    assert trusts(again.leaves[MASTER], again.leaves[POD], START)


def test_openssl_takes_them_strictly(tmp_path: Path) -> None:
    """As the transport does it, and with all that X.509 asks for."""
    now = datetime.now(UTC)
    held = renewed(Held(), "test", ROLES, now)
    contexts = {}
    for role, kind in [(MASTER, ssl.PROTOCOL_TLS_SERVER), (POD, ssl.PROTOCOL_TLS_CLIENT)]:
        leaf = held.leaves[role]
        (tmp_path / "crt").write_bytes(leaf.own.certificate)
        (tmp_path / "key").write_bytes(leaf.own.key)
        context = contexts[role] = ssl.SSLContext(kind)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
        context.load_verify_locations(cadata=leaf.authorities.decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[POD].wrap_bio(to_client, to_server)
    server = contexts[MASTER].wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
    assert client.getpeercert()
    assert server.getpeercert()
    own = x509.load_pem_x509_certificate(held.leaves[POD].own.certificate)
    assert own.not_valid_before_utc <= now - BACKDATED + timedelta(seconds=1)
