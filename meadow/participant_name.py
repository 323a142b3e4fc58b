"""What a participant may be called: a text that looks on every screen like what it is."""

from __future__ import annotations

import unicodedata

from .errors import InvitationError

LONGEST = 64
"""Characters of a name, and bytes of it in UTF-8: a certificate's common name holds no more."""

_HINT = f"1 to {LONGEST} printable characters, no / or \\, no dot or space at its ends"


def normal_name(text: str) -> str:
    """`text` in Unicode's normal form C.  Raises InvitationError where it cannot be a name.

    Two texts that look alike to a reader because of how accents are composed are thus one name,
    and no name can be a path, hide characters or turn the direction of the writing.
    """
    name = unicodedata.normalize("NFC", text)
    tidy = name.isprintable() and name == name.strip(" .") and not set(name) & set("/\\")
    if not name or not tidy:
        raise InvitationError(f"{text[:80]!r} cannot be a participant's name", _HINT)
    if len(name.encode()) > LONGEST:
        raise InvitationError(
            f"the name {name[:80]!r} is too long: {len(name.encode())} bytes in UTF-8",
            f"at most {LONGEST}",
        )
    return name
