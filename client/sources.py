"""Where rows come from: JSON lines, folders of text, `datasets`, or Python's own library.

nano                     the standard-library packages that the embedded base never saw
datasets:NAME[:SPLIT]    a hub name, or a folder saved by `datasets` (split train if not said)
FOLDER                   text files: one client per sub-folder, or per file directly inside
FILE, GLOB               JSON lines, optionally .gz
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..nano.corpus import PARTICIPANTS, held_out_files, package_files, read_source
from .rows import FIELDS, Row, parse_row, read_json_lines

NANO = "nano"
_DATASETS = "datasets:"
_SAVED = ("state.json", "dataset_dict.json")  # what Dataset and DatasetDict.save_to_disk leave


def read_rows(source: str | Sequence[str], chunk: int) -> list[Row]:
    """All rows of one source or of several, in order.

    `chunk` is the length in characters of the pieces that plain files are cut into.
    Raises DataError where something is missing, malformed or empty.
    """
    sources = [source] if isinstance(source, str) else source
    rows = [row for one in sources for row in _read(one, chunk)]
    if not rows:
        raise DataError(f"no rows in {', '.join(sources) or 'an empty list of sources'}")
    return rows


def cut(text: str, chunk: int) -> Iterator[str]:
    """Pieces of whole lines, about `chunk` characters each; blank pieces are left out.

    A line that is longer than `chunk` stays whole and is a piece of its own.
    """
    piece = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if piece and len(piece) + len(line) > chunk:
            yield from [piece] if piece.strip() else []
            piece = ""
        piece += line
    if piece.strip():
        yield piece


def _read(source: str, chunk: int) -> Iterable[Row]:
    if source == NANO:
        return _nano_rows(chunk)
    if source.startswith(_DATASETS):
        return _dataset_rows(source)
    path = Path(source).expanduser()
    if not path.is_dir():
        return (row for file in _matches(path) for row in read_json_lines(file))
    if any((path / name).exists() for name in _SAVED):
        return _dataset_rows(f"{_DATASETS}{path}")
    return _folder_rows(path, chunk)


def _matches(path: Path) -> list[Path]:
    """The file itself, or what it matches as a pattern, sorted by name."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not files:
        raise DataError(f"{path}: matches no file")
    return files


def _nano_rows(chunk: int) -> Iterator[Row]:
    """One client per package; files, not pieces, are held out."""
    for package in PARTICIPANTS:
        files = package_files(package)
        held_out = held_out_files(files)
        for file in files:
            split = "test" if file in held_out else "train"
            for piece in cut(read_source(file) or "", chunk):
                yield Row(package, "", piece, split, package)


def _folder_rows(folder: Path, chunk: int) -> Iterator[Row]:
    seen: set[str] = set()
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        client = entry.name if entry.is_dir() else entry.stem
        if client in seen:
            raise DataError(f"{folder}: more than one entry for client {client!r}", "rename one")
        seen.add(client)
        pieces = [piece for file in _text_files(entry) for piece in cut(_read_text(file), chunk)]
        if not pieces:
            raise DataError(f"participant {client!r} has no text in {entry}")
        yield from (Row(client, "", piece, "", client) for piece in pieces)


def _text_files(entry: Path) -> list[Path]:
    if entry.is_file():
        return [entry]
    visible = (file for file in entry.rglob("[!.]*") if file.is_file())
    return sorted(visible, key=lambda file: file.relative_to(entry).as_posix())


def _read_text(path: Path) -> str:
    if path.suffix in (".jsonl", ".gz"):
        raise DataError(f"{path}: is not plain text", f"for JSON lines give '{path.parent}/*'")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _dataset_rows(source: str) -> Iterator[Row]:
    name, _, split = source.removeprefix(_DATASETS).partition(":")
    data = _load_dataset(name, split or "train")
    for number, record in enumerate(data, start=1):
        known = {field: record[field] for field in FIELDS if field in record}
        yield parse_row(known, f"{source} row {number} (columns {', '.join(record)})")


def _load_dataset(name: str, split: str) -> Any:
    # Imported here: slow, and only this source needs them.
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        if any((Path(name) / file).exists() for file in _SAVED):
            return _pick(datasets.load_from_disk(name), name, split)
        return datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        hint = "check the network, or save the data set to a folder and name that folder"
        raise DataError(
            f"datasets:{name}: the hub cannot be reached: {_line(error)}", hint
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"datasets:{name}: cannot be loaded: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pick(saved: Any, name: str, split: str) -> Any:
    if not isinstance(saved, dict):  # DatasetDict is a dict; a single Dataset has no splits
        return saved
    if split not in saved:
        raise DataError(f"datasets:{name}: no split {split!r}", f"it has {', '.join(saved)}")
    return saved[split]
