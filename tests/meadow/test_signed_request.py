"""Signed requests: nothing in them can be changed, moved to another connection, or repeated."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from enrolment import new_identity
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import IdentityError
from meadow.signed_request import (
    SEQUENCE,
    SESSION,
    SIGNATURE,
    WINDOW,
    Claim,
    SequenceWindow,
    Signer,
    check,
)

ME, OTHER = new_identity(), new_identity()
KEY = ME.public.public_bytes_raw()
NAME = "0123456789abcdef" * 2
REQUEST = ("POST", "/v1/fleet/pull-messages", b"body")
SHOWN = b"certificate"


def signer() -> Signer:
    made = Signer(ME)
    made.begin(NAME)
    return made


def test_a_request_is_what_an_independent_verifier_expects() -> None:
    headers = signer().headers(*REQUEST, SHOWN)
    method, path, body = REQUEST
    fields = [NAME, 1, method, path, hashlib.sha256(body).hexdigest()]
    fields.append(hashlib.sha256(SHOWN).hexdigest())
    text = json.dumps(fields, separators=(",", ":"))
    signature = base64.b64decode(headers["Meadow-Signature"])
    Ed25519PublicKey.from_public_bytes(KEY).verify(
        signature, b"meadow/request/v1\0" + text.encode()
    )
    assert (headers["Meadow-Session"], headers["Meadow-Sequence"]) == (NAME, "1")


def test_requests_count_up_and_begin_again_in_a_new_session() -> None:
    made, claims = signer(), []
    for session in (NAME, NAME[::-1]):
        made.begin(session)
        for _ in range(2):
            headers = made.headers(*REQUEST, SHOWN)
            claims.append(check(headers, *REQUEST, certificate=SHOWN, key=KEY))
    assert claims == [Claim(name, number) for name in (NAME, NAME[::-1]) for number in (1, 2)]


def test_a_session_is_asked_for_without_one() -> None:
    made = Signer(ME)
    with pytest.raises(ValueError):
        made.headers(*REQUEST, SHOWN)
    headers = made.opening(*REQUEST, SHOWN)
    assert check(headers, *REQUEST, certificate=SHOWN, key=KEY) == Claim("", 0)


@pytest.mark.parametrize("session", ["", "x", NAME[:-1], NAME.upper(), NAME + "\n"])
def test_an_impossible_session_is_not_begun(session: str) -> None:
    with pytest.raises(IdentityError):
        Signer(ME).begin(session)


@pytest.mark.parametrize(
    "changed",
    [
        lambda headers: check(headers, "GET", *REQUEST[1:], certificate=SHOWN, key=KEY),
        lambda headers: check(headers, "POST", "/x", b"body", certificate=SHOWN, key=KEY),
        lambda headers: check(headers, "POST", "/\udc80", b"body", certificate=SHOWN, key=KEY),
        lambda headers: check(headers, *REQUEST[:2], b"Body", certificate=SHOWN, key=KEY),
        lambda headers: check(headers, *REQUEST, certificate=b"another's", key=KEY),
        lambda headers: check(
            headers, *REQUEST, certificate=SHOWN, key=OTHER.public.public_bytes_raw()
        ),
        lambda headers: check(headers, *REQUEST, certificate=SHOWN, key=b"short"),
        lambda headers: check(
            {**headers, SESSION: NAME[::-1]}, *REQUEST, certificate=SHOWN, key=KEY
        ),
        lambda headers: check({**headers, SEQUENCE: "2"}, *REQUEST, certificate=SHOWN, key=KEY),
    ],
)
def test_nothing_can_be_changed(changed: Callable[[dict[str, str]], Claim]) -> None:
    with pytest.raises(IdentityError, match="does not hold"):
        changed(signer().headers(*REQUEST, SHOWN))


def test_fields_do_not_run_into_each_other() -> None:
    """What is signed as one method and path never passes as another pair of the same letters."""
    headers = signer().headers("POST", '","/x', b"", SHOWN)
    with pytest.raises(IdentityError):
        check(headers, 'POST","', "/x", b"", certificate=SHOWN, key=KEY)


@pytest.mark.parametrize("name", [SESSION, SEQUENCE, SIGNATURE])
def test_every_header_is_needed(name: str) -> None:
    headers = signer().headers(*REQUEST, SHOWN)
    del headers[name]
    with pytest.raises(IdentityError, match="not signed"):
        check(headers, *REQUEST, certificate=SHOWN, key=KEY)


@pytest.mark.parametrize(
    ("name", "text"),
    [(SEQUENCE, text) for text in ("", "-1", "01", "+1", " 1", "1.0", "١", "1" * 19, "1\n", "0")]
    + [(SESSION, text) for text in ("", NAME.upper(), NAME + "0", NAME + "\n", "x" * 32)]
    + [(SIGNATURE, text) for text in ("", "AAAA", "A" * 88, "A" * 86 + "==\n", "-" * 86 + "==")],
)
def test_headers_have_one_form(name: str, text: str) -> None:
    headers = signer().headers(*REQUEST, SHOWN) | {name: text}
    with pytest.raises(IdentityError):
        check(headers, *REQUEST, certificate=SHOWN, key=KEY)


def test_threads_never_share_a_number() -> None:
    made, found = signer(), []

    def work() -> None:
        for _ in range(50):
            found.append(made.headers(*REQUEST, SHOWN)[SEQUENCE])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, found)) == list(range(1, 201))


NEAR = st.integers(-5, 5) | st.integers(WINDOW - 5, WINDOW + 5) | st.integers(-WINDOW, 3 * WINDOW)


@given(st.lists(NEAR | st.integers(1, 10**17), max_size=40))
def test_a_window_admits_what_a_set_would(numbers: list[int]) -> None:
    """Against the plain definition: new, above 0, and less than 1,024 behind the highest."""
    window, seen = SequenceWindow(), {0}
    for number in numbers:
        expected = number > 0 and number not in seen and number > max(seen) - WINDOW
        assert window.admit(number) == expected
        if expected:
            seen.add(number)
        assert not window.admit(number)


def test_a_window_keeps_the_last_1024() -> None:
    window = SequenceWindow()
    assert window.admit(WINDOW + 1)
    assert not window.admit(1)
    assert all(window.admit(number) for number in range(2, WINDOW + 1))
    assert not any(window.admit(number) for number in range(WINDOW + 2))
