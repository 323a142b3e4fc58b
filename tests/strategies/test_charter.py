"""Charters: what a run's peers agree on, signed by a founder, and the ways to get it wrong."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from gossips import charter_of, identity, member

from meadow.canonical_json import canonical
from meadow.errors import FormatError, IdentityError
from meadow.identity import pae
from meadow.strategies.charter import PAYLOAD, Charter, Member
from meadow.strategies.peer_keys import peer_of

ALICE, BOB, EVE = identity("alice"), identity("bob"), identity("eve")


def resigned(change: dict[str, Any]) -> bytes:
    """Alice's charter with fields changed, signed by her as it then is."""
    fields = charter_of(ALICE, BOB).to_json() | change
    return canonical(ALICE.sign(PAYLOAD, canonical(fields).encode())).encode()


def test_round_trip() -> None:
    charter = charter_of(ALICE, BOB)
    read = Charter.read(charter.sign(BOB))
    assert read == charter and read.digest == charter.digest
    assert read.run.hex() == charter.pool.run_id


def test_only_a_founder_can_sign() -> None:
    charter = charter_of(ALICE, BOB)
    with pytest.raises(IdentityError, match="founder"):
        charter.sign(EVE)
    envelope = EVE.sign(PAYLOAD, canonical(charter.to_json()).encode())
    with pytest.raises(IdentityError, match="no key that is trusted"):
        Charter.read(canonical(envelope).encode())


def test_a_changed_charter_is_refused() -> None:
    envelope = json.loads(charter_of(ALICE, BOB).sign(ALICE))
    other = canonical(charter_of(ALICE, BOB, EVE).to_json()).encode()
    envelope["payload"] = base64.b64encode(other).decode()
    with pytest.raises(IdentityError, match="does not hold"):
        Charter.read(json.dumps(envelope).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"largest_shift": 17},
        {"largest_shift": 1.5},
        {"epsilon_exponent": 99},
        {"gradient_exponent": "x"},
        {"founders": []},
        {"founders": [member(ALICE).to_json()] * 2},
        {"founders": [{"key": "00", "certificate": "", "address": ""}]},
        {"founders": [{**member(ALICE).to_json(), "certificate": "%%"}]},
        {"pool": {}},
        {"pool": []},
        {"pool": None},
        {"pool": charter_of(ALICE).pool.to_json() | {"run_id": "ab"}},
        {"pool": charter_of(ALICE).pool.to_json() | {"base_digest": "ab"}},
        {"unknown": 1},
    ],
)
def test_signed_nonsense_is_refused(change: dict[str, Any]) -> None:
    assert Charter.read(resigned({})) == charter_of(ALICE, BOB)
    with pytest.raises(FormatError):
        Charter.read(resigned(change))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"payload": 1}', b"[" * 10**5])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="not a charter"):
        Charter.read(data)


def test_another_type_of_document_is_refused() -> None:
    """A founder's signature under something else does not make it a charter."""
    payload = canonical(charter_of(ALICE).to_json()).encode()
    envelope = ALICE.sign("application/other", payload)
    assert pae("application/other", payload) != pae(PAYLOAD, payload)
    with pytest.raises(FormatError):
        Charter.read(canonical(envelope).encode())


def test_digests_tell_bases_apart() -> None:
    charter = charter_of(ALICE)
    other = replace(charter, pool=replace(charter.pool, base_digest="ab" * 32))
    assert charter.digest != other.digest


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:0", "host:65536", "a b:1", "é:1"])
def test_addresses_are_host_and_port(address: str) -> None:
    with pytest.raises(FormatError, match="host:port"):
        Member(peer_of(ALICE), b"", address)


def test_outbound_only_peers_have_no_address() -> None:
    assert Member(peer_of(ALICE), b"", "[::1]:99").reachable
    assert not Member(peer_of(ALICE), b"").reachable
