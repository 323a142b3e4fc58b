"""The systemd unit of a participant's daemon: started at boot, restarted, and fenced in.

It may read the participant's text and base model and write its own folder; everything else of the
machine is read-only or hidden (systemd.exec(5)).
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

# What ProtectHome=yes hides (systemd.exec(5)): a service that uses anything there gets these trees
# read-only instead.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))

_TEMPLATE = """\
[Unit]
Description=meadow participant {name}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User={user}
Environment=MEADOW_HOME={home}
Environment=HF_HUB_OFFLINE=1
ExecStart={python} -m meadow.cli client run --folder {folder}
Restart=always
RestartSec=5
KillMode=mixed
TimeoutStopSec=60
UMask=0077

# limits of the whole daemon; the run's own limits are in policy.toml
{limits}
# what it may see and change
ReadWritePaths={writable}
{readable}ProtectSystem=strict
ProtectHome={protect_home}
PrivateTmp=yes
PrivateDevices={private_devices}
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Fence:
    """What the daemon may use."""

    user: str
    readable: Sequence[Path] = ()  # text and base model
    memory_mb: int = 0  # 0: no limit
    cpus: float = 0.0  # 0: no limit
    gpu: bool = False


def readable_paths(sources: Sequence[str]) -> tuple[Path, ...]:
    """What has to be readable for these sources of text and bases: of a pattern, the folder that
    its files are in or below; nothing for a hub's name."""
    paths = [Path(source.removeprefix("datasets:")) for source in sources]
    return tuple(_without_pattern(path) for path in paths if path.is_absolute())


def _without_pattern(path: Path) -> Path:
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path


def unit_text(name: str, folder: Path, home: Path, fence: Fence, python: str = "") -> str:
    """The unit for the participant in `folder`.  Raises ConfigError for what a unit cannot say."""
    paths = [folder, home, *fence.readable, Path(python or sys.executable)]
    for text in (name, fence.user, *map(str, paths)):
        if any(c in text for c in '\n"\\%') or not text:
            raise ConfigError(f"a systemd unit cannot hold {text!r}", "use plain names")
    for path in paths:
        if " " in str(path):
            raise ConfigError(f"a systemd unit's paths have no spaces: {path}")
    limits = f"MemoryMax={fence.memory_mb}M\n" if fence.memory_mb else ""
    limits += f"CPUQuota={round(100 * fence.cpus)}%\n" if fence.cpus else ""
    limits += "TasksMax=512\n"
    in_homes = any(path.is_relative_to(tree) for path in paths for tree in _HOMES)
    return _TEMPLATE.format(
        name=name,
        user=fence.user,
        home=home,
        python=python or sys.executable,
        folder=folder,
        writable=f"{folder} {home}" if fence.gpu else folder,  # there is the lock of each GPU
        limits=limits,
        readable="".join(f"ReadOnlyPaths={path}\n" for path in fence.readable),
        protect_home="read-only" if in_homes else "yes",
        private_devices="no" if fence.gpu else "yes",
    )
