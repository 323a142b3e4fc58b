"""Keys: kept as digests, known by their ids, limited each by itself."""

from __future__ import annotations

import errno
import hmac
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from meadow.errors import ConfigError
from meadow.server.serving.api_keys import add_key, key_id, read_keys, revoke_key
from meadow.server.serving.openai_errors import ApiError
from meadow.server.serving.tenants import Tenants


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def refusal(tenants: Tenants, key: str, scope: Any = "inference") -> ApiError:
    with pytest.raises(ApiError) as caught:
        tenants.caller(f"Bearer {key}", scope)
    return caught.value


def test_the_file_holds_no_key_and_is_its_owners(path: Path) -> None:
    key = add_key(path, "ada", ["inference"])
    text = path.read_text()
    assert key.rpartition("_")[2] not in text and key_id(key) in text
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(key.rpartition("_")[2]) == 64  # 256 bits
    assert add_key(path, "bob", ["admin"]) != key


def test_a_key_is_known_by_all_of_it(path: Path) -> None:
    key = add_key(path, "ada", ["inference"])
    tenants = Tenants(path)
    assert tenants.caller(f"Bearer {key}", "inference").name == "ada"
    assert tenants.caller(f"bearer  {key} ", "inference").name == "ada"
    last = "0" if key[-1] != "0" else "1"
    prefix, id, secret = key.split("_")
    for wrong in (key[:-1] + last, key + "0", key[:-1], f"{prefix}_{id}_", secret, "", "mdw__",
                  f"{prefix}_{id[::-1]}x_{secret}", f"x_{id}_{secret}", f"{key}_"):  # fmt: skip
        assert refusal(tenants, wrong).status == 401
    for header in (None, "", key, f"Basic {key}", "Bearer"):
        with pytest.raises(ApiError) as caught:
            tenants.caller(header, "inference")
        assert caught.value.status == 401 and caught.value.headers["WWW-Authenticate"] == "Bearer"


def test_every_comparison_takes_the_same_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown id or wrong secret: one comparison of two digests, in constant time."""
    key = add_key(path, "ada", ["inference"])
    seen: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        seen.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    tenants = Tenants(path)
    for asked in (key, key[:-1], "mdw_000000000000_" + "0" * 64, ""):
        seen.clear()
        try:
            tenants.caller(f"Bearer {asked}", "inference")
        except ApiError:
            assert asked != key
        assert len(seen) == 1 and all(len(digest) == 64 for digest in seen[0])


def test_a_scope_is_no_other(path: Path) -> None:
    infers, rules = add_key(path, "ada", ["inference"]), add_key(path, "bob", ["admin"])
    both = add_key(path, "eve", ["admin", "inference"])
    tenants = Tenants(path)
    assert refusal(tenants, infers, "admin").status == 403
    assert refusal(tenants, rules, "inference").status == 403
    assert {tenants.caller(f"Bearer {both}", s).name for s in ("admin", "inference")} == {"eve"}


def test_without_a_file_everybody_may_do_everything() -> None:
    tenants = Tenants()
    anyone = tenants.caller(None, "admin")
    with ExitStack() as many:
        for _ in range(1000):
            many.enter_context(tenants.admitted(anyone))
    assert not tenants.are_known


def test_a_revoked_key_is_refused_at_once_and_a_new_one_known(path: Path) -> None:
    key = add_key(path, "ada", ["inference"])
    tenants = Tenants(path)
    added = add_key(path, "bob", ["inference"])
    assert tenants.caller(f"Bearer {added}", "inference").name == "bob"
    revoke_key(path, "ada")
    assert refusal(tenants, key).status == 401
    assert [known.name for known in read_keys(path)] == ["bob"]


@pytest.mark.parametrize("what", ["gone", "damaged", "writable"])
def test_a_file_that_cannot_be_used_any_more_changes_nothing(
    path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Least of all does it open the server."""
    key = add_key(path, "ada", ["inference"])
    tenants = Tenants(path)
    if what == "gone":
        path.unlink()
    elif what == "damaged":
        path.write_text("{")
    else:
        path.chmod(0o666)
    for _ in range(3):
        assert tenants.caller(f"Bearer {key}", "inference").name == "ada"
        assert refusal(tenants, "").status == 401
    assert caplog.text.count("the keys stay as they were") == 1
    path.chmod(0o600) if path.exists() else None
    path.unlink(missing_ok=True)
    add_key(path, "bob", ["inference"])
    assert refusal(tenants, key).status == 401


def test_a_revocation_that_could_not_be_read_at_first_is_read_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a moment in which the process has no file left, say."""
    ada, bob = (add_key(path, name, ["inference"]) for name in ("ada", "bob"))
    tenants = Tenants(path)
    revoke_key(path, "ada")
    refused = 0

    def out_of_files(path: Path) -> bytes:
        nonlocal refused
        refused += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "read_bytes", out_of_files)
        assert tenants.caller(f"Bearer {bob}", "inference").name == "bob"  # as well as it can
        assert refused == 1
    with pytest.raises(ApiError) as caught:
        tenants.caller(f"Bearer {ada}", "inference")
    assert caught.value.status == 401
    assert tenants.caller(f"Bearer {bob}", "inference").name == "bob"


def test_a_rate_is_a_bucket_that_fills_with_time(path: Path) -> None:
    key, clock = add_key(path, "ada", ["inference"], per_minute=3), Clock()
    tenants = Tenants(path, clock)
    ada = tenants.caller(f"Bearer {key}", "inference")
    for _ in range(3):
        with tenants.admitted(ada):
            pass
    with pytest.raises(ApiError, match="3 requests a minute") as caught, tenants.admitted(ada):
        pass
    assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "20"
    clock.now += 15
    with pytest.raises(ApiError) as caught, tenants.admitted(ada):
        pass
    assert caught.value.headers["Retry-After"] == "5"
    clock.now += 5
    with tenants.admitted(ada):
        pass
    clock.now += 10**6  # it never holds more than a minute's
    for _ in range(3):
        with tenants.admitted(ada):
            pass
    with pytest.raises(ApiError), tenants.admitted(ada):
        pass


def test_so_many_answers_at_once_and_each_key_for_itself(path: Path) -> None:
    first = add_key(path, "ada", ["inference"], at_once=3)
    second = add_key(path, "bob", ["inference"], at_once=1)
    tenants = Tenants(path)
    ada, bob = (tenants.caller(f"Bearer {key}", "inference") for key in (first, second))
    with tenants.admitted(ada) as one, tenants.admitted(ada) as two, tenants.admitted(bob) as other:
        one.take(2)
        other.take(1)
        with pytest.raises(ApiError, match="3 answers at once") as caught:
            two.take(2)
        assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "1"
        two.take(1)
        with pytest.raises(ApiError, match="not 4") as caught, tenants.admitted(ada) as many:
            many.take(4)
        assert caught.value.status == 400  # it would never fit: no reason to come again
    with pytest.raises(ZeroDivisionError), tenants.admitted(bob) as place:
        place.take(1)
        raise ZeroDivisionError
    with tenants.admitted(bob) as place:
        place.take(1)
    with tenants.admitted(ada) as place:
        place.take(3)


GOOD: dict[str, Any] = {
    "id": "1", "name": "ada", "digest": "00", "scopes": ["inference"], "per_minute": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it: Invalid JSON"),
        ("[]", "it: Input should be an object"),
        ('{"format": 2, "keys": []}', "format: Input should be 1"),
        (json.dumps({"format": 1, "keys": [GOOD, GOOD]}), "two have one id"),
        (json.dumps({"format": 1, "keys": [{"id": "1"}]}), "keys.0.name: Field required"),
        (json.dumps({"format": 1, "keys": [3]}), "keys.0: "),
        (json.dumps({"format": 1, "keys": [{**GOOD, "x": 1}]}), "keys.0.x: Extra"),
        (json.dumps({"format": 1, "keys": [{**GOOD, "scopes": ["root"]}]}), "scopes.0: "),
        (json.dumps({"format": 1, "keys": [{**GOOD, "per_minute": -1}]}), "per_minute: "),
        (json.dumps({"format": 1, "keys": [{**GOOD, "at_once": "2"}]}), "at_once: "),
    ],
)
def test_a_malformed_file_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message):
        Tenants(path)


def test_what_cannot_be_done_says_why(path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file of keys"):
        Tenants(path)
    with pytest.raises(ConfigError, match="no such file of keys"):
        revoke_key(path, "ada")
    add_key(path, "ada", ["inference"])
    with pytest.raises(ConfigError, match="there is a key called 'ada'"):
        add_key(path, "ada", ["inference"])
    with pytest.raises(ConfigError, match="no key called 'bob'"):
        revoke_key(path, "bob")
    for name in ("", "a\nb", "x" * 65):
        with pytest.raises(ConfigError, match="cannot be a key's name"):
            add_key(path, name, ["inference"])
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by others"):
        Tenants(path)
    assert not [name for name in os.listdir(path.parent) if name.endswith(".draft")]
