"""What a name means, while versions come, go, break and are no longer trusted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registries import BLUEPRINT, ME, adapter, open_registry, place

from meadow.errors import AdapterError, IdentityError, MeadowError, UnknownModelError
from meadow.peft_adapters.peft_format import WEIGHTS
from meadow.server.registry import Registry, Version
from meadow.server.registry_gc import Retention
from meadow.server.serving.catalogue import Catalogue
from meadow.server.serving.served import Served

PATIENCE = 30.0


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path) as registry:
        yield registry


def looking_at(registry: Registry | None) -> Catalogue:
    return Catalogue("base", BLUEPRINT, registry, poll_seconds=0.01)


def add(registry: Registry, number: int, alias: str = "prod", name: str = "a") -> Version:
    version = registry.keep(name, adapter(number))
    return registry.promote(version, alias) if alias else version


def meaning(catalogue: Catalogue, model: str) -> str:
    with catalogue.acquire(model) as lease:
        return str(lease.model)


def soon(question: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not question():
        assert time.monotonic() < end
        time.sleep(0.005)


def damage(registry: Registry, version: Version) -> None:
    path = place(registry, version.id) / WEIGHTS
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))


def test_names_versions_and_digests(registry: Registry) -> None:
    one, two = add(registry, 1), add(registry, 2, "canary")
    with looking_at(registry) as catalogue:
        found = {
            name: meaning(catalogue, name)
            for name in ("a", "a@prod", "a@canary", "a@v1", "a@v2", f"a@sha256:{two.id[:12]}")
        }
        assert list(found.values()) == ["a@v1", "a@v1", "a@v2", "a@v1", "a@v2", "a@v2"]
        with catalogue.acquire("a") as lease:
            assert lease.model == Served("a", "v1", one.id, "prod")
            assert lease.model.fingerprint == one.id[:12] and not lease.model.is_base
        with catalogue.acquire("base") as lease:
            assert lease.model == Served("base") and lease.model.is_base


@pytest.mark.parametrize(
    "name",
    ["", "b", "a@beta", "a@v9", "a@sha256:" + "0" * 12, "/etc/passwd", "../a", "a/../b", "a@/x",
     "BASE", "a" * 10**5, "a\n", "a@v1@v1", "~/a", "C:\\a", "a@v0"],
)  # fmt: skip
def test_what_does_not_exist_is_unknown(registry: Registry, name: str) -> None:
    add(registry, 1)
    for there in (registry, None):
        with looking_at(there) as catalogue, pytest.raises(UnknownModelError) as caught:
            catalogue.acquire(name)
        assert len(str(caught.value)) < 300


def test_an_alias_moves_and_a_request_stays(registry: Registry) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue, catalogue.acquire("a") as early:
        two = add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        assert str(early.model) == "a@v1"
        assert catalogue.read(early.model).tree["m.q_proj.lora_A"][0, 0] == 1
        registry.rollback("a")
        soon(lambda: meaning(catalogue, "a") == "a@v1")
        assert meaning(catalogue, "a@v2") == str(two)


def test_a_move_is_seen_whenever_it_comes(registry: Registry) -> None:
    """Also one that comes while the alias is asked for the first time."""
    versions = [add(registry, number, "") for number in (1, 2)]
    for turn in range(40):
        registry.promote(versions[turn % 2])
        with looking_at(registry) as catalogue:
            mover = threading.Thread(target=registry.promote, args=[versions[1 - turn % 2]])
            mover.start()
            meaning(catalogue, "a")
            mover.join()
            wanted = str(versions[1 - turn % 2])
            soon(lambda: meaning(catalogue, "a") == wanted)  # noqa: B023


def test_a_version_is_ready_before_its_alias_moves(registry: Registry) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        warmed: list[tuple[str, str]] = []

        def warm(model: Served) -> None:
            catalogue.read(model)  # its files are kept for whoever loads it
            warmed.append((str(model), meaning(catalogue, "a")))

        catalogue.warm = warm
        add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        assert warmed == [("a@v2", "a@v1")]


def test_a_version_that_does_not_verify_stays_out(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        two = registry.keep("a", adapter(2))
        registry.promote(two)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        registry.rollback("a")
        soon(lambda: meaning(catalogue, "a") == "a@v1")
        registry.promote(two)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        three = registry.keep("a", adapter(3))
        registry.promote(three)
        soon(lambda: meaning(catalogue, "a") == "a@v3")
    damage(registry, three)
    with looking_at(registry) as catalogue:  # begun anew: at first use
        assert meaning(catalogue, "a") == "a@v2"
        assert catalogue.health().behind == ("a@prod",) and catalogue.health().refused >= 1
        with pytest.raises(AdapterError):
            catalogue.acquire("a@v3")
        registry.keep("a", adapter(3))  # mended
        soon(lambda: meaning(catalogue, "a") == "a@v3")
        assert catalogue.health().behind == ()
    assert "stays out" in caplog.text


def test_without_a_version_that_verifies_there_is_an_error(registry: Registry) -> None:
    version = add(registry, 1)
    damage(registry, version)
    with looking_at(registry) as catalogue:
        for _ in range(2):
            with pytest.raises(AdapterError):
                catalogue.acquire("a")


def test_a_key_that_is_no_longer_trusted_serves_nothing_new(registry: Registry) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        lease = catalogue.acquire("a")
        registry.distrust(ME.key_id)

        def refused() -> bool:
            try:
                catalogue.acquire("a").release()
            except IdentityError:
                return True
            return False

        lease.release()
        soon(refused)


def test_a_version_in_use_is_not_collected(registry: Registry, tmp_path: Path) -> None:
    one = add(registry, 1)
    nothing = Retention(history=0, days=0)
    with looking_at(registry) as catalogue:
        lease = catalogue.acquire("a")
        for number in (2, 3):
            add(registry, number)
            soon(lambda: meaning(catalogue, "a") == f"a@v{number}")  # noqa: B023
        assert one.id in registry.collect(nothing).in_use
        assert catalogue.read(lease.model).rank == 8
        lease.release()
        lease.release()
        assert one.id in {version.id for version in registry.collect(nothing).versions}


def test_while_the_registry_is_away_names_mean_what_they_did(
    registry: Registry, tmp_path: Path
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        away = (tmp_path / "registry").rename(tmp_path / "away")
        soon(lambda: catalogue.health().registry != "")
        assert meaning(catalogue, "a") == "a@v1"
        with pytest.raises(MeadowError):
            catalogue.acquire("a@v2")
        away.rename(tmp_path / "registry")
        soon(lambda: catalogue.health().registry == "")
        add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")


def test_cards_name_no_path(registry: Registry, tmp_path: Path) -> None:
    one, two = add(registry, 1, name="t/a"), add(registry, 2, "canary", "t/a")
    with looking_at(registry) as catalogue:
        cards = catalogue.cards()
    assert [(card.id, card.parent, card.version, card.digest) for card in cards] == [
        ("base", "", "", ""),
        ("t/a@canary", "base", "v2", two.id),
        ("t/a", "base", "v1", one.id),
    ]
    assert str(tmp_path) not in repr(cards)


def test_an_alias_that_is_gone_is_unknown(registry: Registry) -> None:
    """Aliases go with their adapters, once nothing points there."""
    with looking_at(registry) as catalogue:
        with pytest.raises(UnknownModelError):
            catalogue.acquire("a")
        add(registry, 1)
        assert meaning(catalogue, "a") == "a@v1"  # at once, before the next look
