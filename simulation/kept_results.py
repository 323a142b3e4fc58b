"""What a benchmark of hours has measured so far, so that the same command goes on where it was cut.

`measured.jsonl` in the benchmark's folder: a line that says where and by which commit, then one
line a result.  Another commit, other hardware or a changed checkout begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ..canonical_json import Json, canonical
from ..errors import DataError


class KeptResults:
    """Results by key, each on disk before it is returned."""

    def __init__(self, path: Path, origin: Mapping[str, str]) -> None:
        """`origin` is what results must share to be used together (commit, hardware)."""
        self._path = path
        self._found: dict[str, Json] = {}
        commit = origin["commit"]
        known = commit != "unknown" and not commit.endswith("-dirty")
        lines = self._lines() if known else []
        if lines and lines[0] == dict(origin):
            for line in lines[1:]:
                assert isinstance(line, dict)
                self._found[canonical(line["key"])] = line["result"]
        else:
            self._path.write_text(json.dumps(dict(origin)) + "\n", encoding="utf-8")

    def result(self, key: Json, measure: Callable[[], Json]) -> Json:
        """The kept result of a key, measured where there is none yet."""
        name = canonical(key)
        if name not in self._found:
            found = measure()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": found}) + "\n")
            self._found[name] = found
        return self._found[name]

    def _lines(self) -> list[Json]:
        """The file's lines; one that a power cut tore is dropped, from the file too."""
        if not self._path.exists():
            return []
        whole, _, torn = self._path.read_text(encoding="utf-8").rpartition("\n")
        if torn:
            self._path.write_text(f"{whole}\n", encoding="utf-8")
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise DataError(f"{self._path} is not readable: {error}", "delete it") from error
