"""What a benchmark of hours has measured so far, so that the same command goes on where it was cut.

`measured.jsonl` in the benchmark's folder: a line that says where and by which commit, then one
line a result.  Another commit, other hardware or a changed checkout begins anew, but for commits
whose results are asked to count too: their lines say so from then on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ..canonical_json import Json, canonical
from ..errors import DataError


class KeptResults:
    """Results by key, each on disk before it is returned."""

    def __init__(self, path: Path, origin: Mapping[str, str], reuse: Collection[str] = ()) -> None:
        """`origin` is what results must share to be used together (commit, hardware); `reuse` names
        commits, older or newer, whose results count as well.

        Raises DataError where the file is damaged, or holds none of those commits' results.
        """
        self._path, self._commit = path, origin["commit"]
        self._found: dict[str, Json] = {}
        self._used: set[str] = set()
        known = self._commit != "unknown" and not self._commit.endswith("-dirty")
        lines = self._lines() if known else []
        if lines and lines[0] == dict(origin):
            self._found = {canonical(line["key"]): line for line in lines[1:]}
            return
        taken = self._taken(lines, origin, reuse) if reuse else []
        self._found = {canonical(line["key"]): line for line in taken}
        text = "".join(json.dumps(line) + "\n" for line in (dict(origin), *taken))
        draft = path.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)

    @property
    def others(self) -> list[str]:
        """The other commits of which results were used."""
        return sorted(self._used - {self._commit})

    def result(self, key: Json, measure: Callable[[], Json]) -> Json:
        """The kept result of a key, measured where there is none yet."""
        name = canonical(key)
        if name not in self._found:
            found = measure()
            line = {"key": key, "result": found}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._found[name] = line
        self._used.add(self._found[name].get("commit", self._commit))
        return self._found[name]["result"]

    def _taken(
        self, lines: list[Json], origin: Mapping[str, str], reuse: Collection[str]
    ) -> list[Json]:
        """The results of the commits to be reused, each with its commit."""
        head = lines[0] if lines else {}
        found = [{"commit": head.get("commit"), **line} for line in lines[1:]]
        taken = [line for line in found if line["commit"] in reuse]
        if not taken or head.get("hardware") != origin["hardware"]:
            raise DataError(
                f"{self._path} has no results of {', '.join(reuse)} on {origin['hardware']}",
                "name the commit in the file's first line, on the machine that it names",
            )
        return taken

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
