"""Text that every Python installation carries: nano's pre-training set and the demo's participants.

The packages named in `PARTICIPANTS` exist in Python 3.11 to 3.14 and are kept out of
pre-training together with their tests; each is one participant with its own vocabulary and
habits (natural, non-IID).  Files, not rows, are held out, so that no function is on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PARTICIPANTS = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "__phello__"}
_SKIPPED_PREFIXES = ("config-", "bad_coding", "badsyntax", "_sysconfigdata")
_LONGEST_LINE = 400  # longer lines are generated tables, not prose or code


def standard_library() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_source(path: Path) -> str | None:
    """The text of a source file, or None where it is not UTF-8 or looks generated."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    if not text.strip() or max(map(len, text.splitlines())) > _LONGEST_LINE:
        return None
    return text


def package_files(package: str) -> list[Path]:
    """Source files of one standard-library package, tests left out, sorted by name."""
    root = standard_library() / package
    files = (
        path
        for path in root.rglob("*.py")
        if not {"test", "tests", "__pycache__"} & set(path.parts)
    )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def held_out_files(files: list[Path], least: float = 0.15, most: float = 0.4) -> set[Path]:
    """Files that a participant never trains on: between `least` and `most` of its bytes.

    The order is by SHA-256 of the file's name, so that it depends on nothing else.
    """
    sizes = {path: path.stat().st_size for path in files}
    total, held, taken = sum(sizes.values()), 0, set()
    for path in sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        if held < least * total and held + sizes[path] <= most * total:
            taken.add(path)
            held += sizes[path]
    return taken


def _of_a_participant(relative: Path) -> bool:
    parts = [part.removesuffix(".py").lower() for part in relative.parts]
    return any(
        part == package or part.startswith((f"test_{package}", f"_test_{package}"))
        for part in parts
        for package in PARTICIPANTS
    )


def pretraining_files() -> Iterator[tuple[str, str, bool]]:
    """(relative name, text, is a test) of all that nano may see, in sorted order."""
    root = standard_library()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts) or _of_a_participant(relative):
            continue
        if any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        if relative.parts[:1] == ("pydoc_data",):
            yield from _topics(path)
            continue
        text = read_source(path)
        if text is not None:
            yield relative.as_posix(), text, bool({"test", "tests"} & set(relative.parts))


def _topics(path: Path) -> Iterator[tuple[str, str, bool]]:
    """The manual's pages in `pydoc_data.topics`, read as data, never imported."""
    if path.name != "topics.py":
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"pydoc_data/{name}", text, False
