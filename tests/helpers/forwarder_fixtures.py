"""A forwarder for each test file: a pytest plugin, used with forwarders.py.

The gateway it speaks to is the test file's own `place`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forwarders import Local, local
from gateways import Site, home


@pytest.fixture(scope="module")
def machine(place: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    anna = place.participant("anna")
    folder = home(tmp_path_factory.mktemp("anna") / "home", anna)
    with local(place, anna, folder) as made:
        yield made
