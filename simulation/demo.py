"""`meadow demo`: a whole federation on one machine, from nothing, in minutes.

nano, the embedded model, meets participants it has never seen: packages of the standard library,
one a participant, each with its own vocabulary.  They fine-tune it together without showing each
other their text; the result is compared with training alone and with training on all text in
one place, and read back by plain peft + transformers in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import MeadowError
from ..events import Observer
from ..peft_adapters.adapter_reader import load_adapter
from ..store import Disk
from . import baselines
from .engine import Lab, Progress, Result, open_lab, simulate
from .sample import complete

REPORT = "result.json"

FULL = Config().replace(
    data={"participants": 4, "max_length": 96, "chunk": 240, "held_out_rows": 32},
    rounds={"count": 6},
    clients={"steps": 7, "batch": 4, "lr": 6e-3},
)
QUICK = FULL.replace(
    data={"participants": 2, "train_rows": 40, "held_out_rows": 12},
    rounds={"count": 2},
    clients={"steps": 3},
)

Phase = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """What `run` needs to tell its user as it goes."""

    observer: Observer
    progress: Progress
    phase: Phase


def planned_steps(config: Config, participants: int) -> int:
    """Client-steps of the whole demo: federated, alone, and six centralised runs."""
    once = participants * config.rounds.count * config.clients.steps
    return once * (2 + 2 * len(baselines.GRID))


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the next numbered one if it holds a finished demo already."""
    folder, number = wanted, 1
    while (folder / REPORT).exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run(config: Config, folder: Path, tell: Demo) -> dict[str, Any]:
    """The demo's report; also written to `result.json` in the run's folder."""
    began = time.monotonic()
    tell.phase("loading")
    lab = open_lab(config)
    tell.phase("federated")
    result = simulate(config, folder, lab, tell.observer, progress=tell.progress)
    tell.phase("alone")
    alone = baselines.local_only(lab, config, tell.progress)
    tell.phase("centralised")
    pooled = baselines.centralised(lab, config, baselines.grid_of(config), tell.progress)
    tell.phase("reading the adapter back with peft")
    report = {
        "base_loss": result.base_loss,
        "local_loss": alone.loss,
        "federated_loss": result.loss,
        "centralised_loss": pooled.loss,
        "share": baselines.share(result.base_loss, result.loss, pooled.loss),
        "peft_loss": read_back(folder),
        "losses": {
            "base": dict(result.metrics[0]["losses"]),
            "alone, own text": alone.own_losses,
            "alone, everyone's text": alone.losses,
            "federated": result.losses,
        },
        "centralised": {"way": pooled.way, "lr": pooled.lr, "tried": pooled.tried},
        "bytes_up": result.total("bytes_up"),
        "bytes_down": result.total("bytes_down"),
        "rounds": config.rounds.count,
        "sample": sample(lab, result),
        "adapter": str(result.adapter),
        "seconds": round(time.monotonic() - began, 1),
    }
    Disk().write(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def read_back(folder: Path) -> float:
    """The held-out loss that plain peft + transformers find, in a second process."""
    command = [sys.executable, "-P", "-m", "meadow.simulation.read_back", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise MeadowError(f"the second process could not use the adapter: {last}")
    return float(json.loads(done.stdout)["loss"])


def sample(lab: Lab, result: Result, tokens: int = 48) -> dict[str, str]:
    """How base and federated model go on from the same unseen text."""
    person = max(lab.participants, key=lambda person: len(person.held_out))
    prompt = max(person.held_out, key=lambda example: len(example.ids)).ids[:40]
    tree = lab.bench.tree(load_adapter(result.adapter, sites=lab.layers))
    return {
        "participant": person.name,
        "prompt": lab.base.tokenizer.decode(prompt, skip_special_tokens=True),
        "before": complete(lab.bench, None, prompt, tokens),
        "after": complete(lab.bench, tree, prompt, tokens),
    }
