"""`flwr` played by a script: knows its registered nodes, and says what it was asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meadow import flower_commands

_SCRIPT = """#!{python}
import json, pathlib, sys
state = pathlib.Path({state!r})
known = json.loads(state.read_text())
arguments = sys.argv[1:]
known["asked"].append(arguments)
def end(answer):
    draft = state.with_suffix(".draft")
    draft.write_text(json.dumps(known))
    draft.replace(state)
    print("Loading project configuration...")
    print(json.dumps(answer))
    sys.exit(not answer["success"])
failing = state.with_suffix(".fail")
if failing.exists():
    reason = failing.read_text()
    failing.unlink()
    end({{"success": False, "error-message": reason}})
if state.with_suffix(".down").exists():
    end({{"success": False, "error-message": "Connection to the SuperLink is unavailable."}})
if arguments[:2] == ["supernode", "register"]:
    key = pathlib.Path(arguments[2]).read_text()
    if key in known["nodes"]:
        end({{"success": False, "error-message": "Public key already in use"}})
    known["nodes"][key] = 100 + len(known["nodes"])
    end({{"success": True, "node-id": str(known["nodes"][key])}})
if arguments[:2] == ["supernode", "list"]:
    end({{"success": True, "nodes": [{{"node-id": str(n)}} for n in known["nodes"].values()]}})
if arguments[0] == "run":
    known["runs"] += 1
    end({{"success": True, "run-id": str(known["runs"])}})
if arguments[0] == "stop":
    end({{"success": True}})
if arguments[0] == "build":
    pathlib.Path("meadow.fab").write_text("entry points")
    end({{"success": True}})
"""


class PlayedFlower:
    """The script, and what it knows."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._state, script = folder / "flwr.json", folder / "flwr"
        self._state.write_text(json.dumps({"nodes": {}, "asked": [], "runs": 0}))
        script.write_text(_SCRIPT.format(python=sys.executable, state=str(self._state)))
        script.chmod(0o700)
        patch.setattr(flower_commands, "program", lambda name: str(script))

    @property
    def asked(self) -> list[list[str]]:
        """The arguments of every call."""
        found: list[list[str]] = json.loads(self._state.read_text())["asked"]
        return found

    @property
    def registered(self) -> list[str]:
        """OpenSSH public keys, in their order."""
        return list(json.loads(self._state.read_text())["nodes"])

    def fail_once(self, reason: str) -> None:
        """The next call is not carried out."""
        self._state.with_suffix(".fail").write_text(reason)

    def set_down(self, down: bool) -> None:
        """Whether the SuperLink is away."""
        file = self._state.with_suffix(".down")
        file.touch() if down else file.unlink()
