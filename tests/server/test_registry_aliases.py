"""Where aliases point: promotions that gates allow or refuse, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
from registries import ME, changed, flip, open_registry, place, publish

from meadow.errors import PromotionError, RegistryError, UnknownAdapterError
from meadow.server.registry import Registry
from meadow.server.registry_gates import Checked, Verdict

pytest_plugins = ("registry_fixtures",)


def test_rollback_goes_further_back_each_time(registry: Registry) -> None:
    publish(registry, 1, 2, 3)
    for text in ("mail@v1", "mail@v2", "mail@v2", "mail@v3"):
        registry.promote(text, why=f"try {text}")
    assert [registry.rollback("mail", why="worse").number for _ in range(2)] == [2, 1]
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback("mail")
    registry.promote("mail@v3")
    assert registry.rollback("mail").number == 1
    moves = registry.history("mail", "prod")
    assert [entry.kind for entry in moves] == ["moved"] * 3 + ["rolled back"] * 2 + [
        "moved", "rolled back",
    ]  # fmt: skip
    assert {entry.who for entry in moves} == {ME.key_id}
    assert [moves[0].why, moves[3].why] == ["try mail@v1", "worse"]
    assert [entry.before for entry in moves[1:]] == [entry.after for entry in moves[:-1]]


def test_rollback_passes_over_what_no_longer_verifies(registry: Registry) -> None:
    one, two, _ = publish(registry, 1, 2, 3)
    for number in (1, 2, 3):
        registry.promote(f"mail@v{number}")
    changed(place(registry, two), "adapter_model.safetensors", flip)
    assert registry.rollback("mail").id == one


def test_rollback_of_what_never_was(registry: Registry) -> None:
    publish(registry, 1)
    with pytest.raises(UnknownAdapterError, match="no alias prod"):
        registry.rollback("mail")


class Fixed:
    """A gate that has made up its mind, and keeps what it was asked."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons
        self.asked: list[tuple[str, str | None]] = []

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        now = None if current is None else str(current.version)
        self.asked.append((str(candidate.version), now))
        return Verdict(not self.reasons, self.reasons, {"loss": 1.5})


def test_a_gate_is_asked_and_its_refusal_kept(registry: Registry) -> None:
    one, two = publish(registry, 1, 2)
    passes, refuses = Fixed(), Fixed("too bad", "too old")
    registry.promote("mail@v1", gate=passes)
    with pytest.raises(
        PromotionError, match="mail@v2 is not promoted to prod: too bad; too old"
    ) as e:
        registry.promote("mail@v2", gate=refuses)
    assert e.value.reasons == ("too bad", "too old")
    assert passes.asked == [("mail@v1", None)] and refuses.asked == [("mail@v2", "mail@v1")]
    assert registry.resolve("mail").id == one
    moved, refused = registry.history("mail", "prod")
    assert (moved.kind, dict(moved.figures)) == ("moved", {"loss": 1.5})
    assert (refused.kind, refused.before, refused.after) == ("refused", one, two)
    assert refused.why == "too bad; too old"


def test_a_gate_is_asked_again_where_the_alias_moved_meanwhile(
    registry: Registry, tmp_path: Path
) -> None:
    publish(registry, 1, 2, 3)
    registry.promote("mail@v1")

    class Overtaken(Fixed):
        def check(self, candidate: Checked, current: Checked | None) -> Verdict:
            if not self.asked:
                with open_registry(tmp_path) as other:
                    other.promote("mail@v2")
            return super().check(candidate, current)

    gate = Overtaken()
    registry.promote("mail@v3", gate=gate)
    assert gate.asked == [("mail@v3", "mail@v1"), ("mail@v3", "mail@v2")]
    assert registry.rollback("mail").number == 2


def test_what_does_not_verify_any_more_can_be_replaced(registry: Registry) -> None:
    one, _ = publish(registry, 1, 2)
    registry.promote("mail@v1")
    changed(place(registry, one), "adapter_model.safetensors", flip)
    gate = Fixed()
    registry.promote("mail@v2", gate=gate)
    assert gate.asked == [("mail@v2", None)]


@pytest.mark.parametrize("alias", ["", "v7", "a b", "../x", "sha256:" + "0" * 12, "-x", "x" * 65])
def test_an_alias_is_a_word(registry: Registry, alias: str) -> None:
    publish(registry, 1)
    with pytest.raises(RegistryError, match="cannot be an alias"):
        registry.promote("mail@v1", alias)
