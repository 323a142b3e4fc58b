"""A gateway for each test file that attacks it: a pytest plugin, used with attacks.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attacks import LARGEST, Wire
from gateways import Person, Site, site

from meadow.client.gateway_client import GatewayClient


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator"), largest=LARGEST, grace=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def mallory(place: Site) -> Person:
    """An approved participant who means no good."""
    return place.participant("mallory")


@pytest.fixture(scope="module")
def bob(place: Site) -> Person:
    return place.participant("bob")


@pytest.fixture
def client(mallory: Person) -> Iterator[GatewayClient]:
    with mallory.client() as made:
        made.now()  # opens a session
        yield made


@pytest.fixture
def unreached(place: Site) -> Iterator[None]:
    """Nothing may have reached the SuperLink in the end."""
    before = len(place.superlink.seen)
    yield
    assert place.superlink.seen[before:] == []


@pytest.fixture
def wire(place: Site, mallory: Person) -> Iterator[Wire]:
    made = Wire(place, mallory)
    yield made
    made.close()
