"""What the resident trainer keeps loaded for one run: base model, the participant's text, member.

The base is loaded once in a process's life; one that cannot be used needs a restart.  Text that
could not be read, and a GPU that was another's, are tried again with the next request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..closeable import Closeable
from ..config import Config
from ..errors import FormatError, MeadowError
from ..identity import default_path
from ..peft_adapters.blueprint import check_shape
from ..store import Disk
from ..strategies.base import Answer, Request, Strategy
from ..strategies.registry import strategy_of
from ..strategies.transforms import make_transforms
from ..terms import Terms
from .data import silo_of
from .gpu_lock import gpu_claimed
from .home import OUTBOX
from .member import Member
from .outbox import Outbox
from .participant_text import ParticipantText, Text
from .policy import Policy
from .task import Participant, answer
from .trainer import Trainer
from .workbench import Workbench, open_workbench


@dataclass
class Loads:
    """How often something was loaded, when last, and how long all of it took."""

    count: int = 0
    at: float = 0.0  # unix seconds
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count, self.at, self.seconds = self.count + 1, time.time(), self.seconds + seconds


@dataclass
class Loaded:
    """A participant's text as tokens."""

    text: Text
    person: Participant
    truncated: int  # rows that were too long


@dataclass
class Workplace(Closeable):
    """One participant's part in one run.  One thread at a time may use it."""

    folder: Path
    name: str
    terms: Terms
    disk: Disk
    progress: Callable[[int], None]
    """Told of every step that was made."""
    base_loads: Loads = field(default_factory=Loads)
    text_loads: Loads = field(default_factory=Loads)
    loaded: Loaded | None = None
    _bench: Workbench | None = None
    _trainer: Trainer | None = None
    _base_fault: MeadowError | None = None
    _claimed: bool = False
    _held: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        run, chunk = self.terms.run, self.terms.config.data.chunk
        self._text = ParticipantText(self.folder, run, chunk, self.disk)

    def close(self) -> None:
        """Let others use the GPU."""
        self._held.close()

    @property
    def config(self) -> Config:
        return self.terms.config

    def member(self, policy: Policy, outbox: Outbox | None = None) -> Member:
        """The participant, ready to work on the text as it is now.

        Raises ModelError, FormatError, DataError, ConfigError or PolicyError where it cannot.
        """
        trainer, clients = self._trainer_of(policy), self.config.clients
        person = self._person(policy)

        def respond(request: Request) -> Answer:
            self.progress(0)
            return answer(request, person, trainer)

        transforms = make_transforms(clients.clip_update, clients.wire)
        outbox = outbox or Outbox(self.folder / OUTBOX, self.name, self.terms.run, self.disk)
        return Member(self.name, self.strategy(policy), outbox, respond, transforms)

    def strategy(self, policy: Policy) -> Strategy:
        config, layers = self.config, self._workbench(policy).layers
        made = strategy_of(config, layers, self.terms.base_digest)
        made.check_clients(config.clients)
        check_shape(config.model.rank, layers, made.integers)
        return made

    @property
    def loading_seconds(self) -> float:
        """All time spent on loading so far."""
        return self.base_loads.seconds + self.text_loads.seconds

    def _workbench(self, policy: Policy) -> Workbench:
        """A base that could not be used is not read again and again: it needs a restart."""
        if self._base_fault is not None:
            raise self._base_fault
        if self._bench is None:
            self._claim_gpu()
            begun = time.perf_counter()
            try:
                self._bench = self._load_base(policy)
            except MeadowError as error:
                self._base_fault = error
                raise
            self.base_loads.add(time.perf_counter() - begun)
        return self._bench

    def _claim_gpu(self) -> None:
        """Raises ModelError while another run has it: that ends one day."""
        if not self._claimed:
            claim = gpu_claimed(self.config.model.device, default_path().parent)
            self._held.enter_context(claim)
            self._claimed = True

    def _load_base(self, policy: Policy) -> Workbench:
        config = self.config.replace(model={"base": policy.base}) if policy.base else self.config
        bench = open_workbench(config)
        if bench.base.digest != self.terms.base_digest:
            raise FormatError(
                f"the participant's base model has digest {bench.base.digest[:16]},"
                f" the run's {self.terms.base_digest[:16]}",
                "the same files are needed on every machine",
            )
        return bench

    def _trainer_of(self, policy: Policy) -> Trainer:
        if self._trainer is None:
            bench = self._workbench(policy)
            self._trainer = Trainer(bench.bank, self.config.clients, bench.pad, self.progress)
        return self._trainer

    def _person(self, policy: Policy) -> Participant:
        begun = time.perf_counter()
        text = self._text.current(policy)
        if self.loaded is None or self.loaded.text.digest != text.digest:
            bench, data = self._workbench(policy), self.config.data
            silo = silo_of(self.name, text.rows, data.train_rows, data.held_out_rows)
            self.loaded = Loaded(text, *bench.encode(silo, self.config))
            self.text_loads.add(time.perf_counter() - begun)
        return self.loaded.person
