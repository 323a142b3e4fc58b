"""What a name means while versions come and go, aliases move and many ask at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from catalogues import PATIENCE, add, looking_at, meaning, soon
from registries import ME

from meadow.errors import UnknownModelError
from meadow.server.registry import Registry, Version
from meadow.server.registry_gc import Retention
from meadow.server.serving.served import Served

pytest_plugins = ("registry_fixtures",)


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


def test_many_who_ask_at_once_verify_a_version_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        own, leased, go_on = registry.lease, list[Version](), threading.Event()

        def lease(version: Version, *more: Any) -> Any:
            leased.append(version)
            assert go_on.wait(PATIENCE)
            return own(version, *more)

        monkeypatch.setattr(registry, "lease", lease)
        callers = [threading.Thread(target=meaning, args=[catalogue, "a"]) for _ in range(6)]
        for caller in callers:
            caller.start()
        soon(lambda: bool(leased))
        go_on.set()
        for caller in callers:
            caller.join()
        assert len(leased) == 1


def test_what_is_kept_open_is_what_the_last_one_said(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two aliases that are asked for the first time at once: both stay open."""
    for name in ("a", "b"):
        add(registry, 1, name=name)
    with looking_at(registry) as catalogue:
        own, held, go_on = catalogue._versions.keep, threading.Event(), threading.Event()

        def keep(versions: Any) -> None:
            listed = list(versions)
            if not held.is_set():
                held.set()
                go_on.wait(0.5)
            own(listed)

        monkeypatch.setattr(catalogue._versions, "keep", keep)
        first = threading.Thread(target=meaning, args=[catalogue, "a"])
        first.start()
        assert held.wait(PATIENCE)
        second = threading.Thread(target=meaning, args=[catalogue, "b"])
        second.start()
        second.join(0.2)
        go_on.set()
        for thread in (first, second):
            thread.join()
        assert {key.name for key in catalogue._versions._entries} == {"a@v1", "b@v1"}


def test_what_is_in_use_is_had_without_a_look_at_the_disk(
    registry: Registry, tmp_path: Path
) -> None:
    add(registry, 1)
    add(registry, 2, "canary")
    with looking_at(registry) as catalogue:
        assert catalogue.ready("a") is None and catalogue.ready("../a") is None
        assert [meaning(catalogue, name) for name in ("a", "a@canary")] == ["a@v1", "a@v2"]
        (tmp_path / "registry").rename(tmp_path / "away")
        for name, means in (("a", "a@v1"), ("a@prod", "a@v1"), ("a@canary", "a@v2")):
            lease = catalogue.ready(name)
            assert lease is not None and str(lease.model) == means
            lease.release()
        assert not any(map(catalogue.ready, ("a@v1", "a@@prod", "a@", "", "b")))
        base = catalogue.ready("base")
        assert base is not None and base.model.is_base
        (tmp_path / "away").rename(tmp_path / "registry")
        registry.distrust(ME.key_id)
        soon(lambda: catalogue.ready("a") is None)
