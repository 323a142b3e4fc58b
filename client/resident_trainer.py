"""The resident trainer: a participant's own process, which keeps the base model loaded and answers
what Flower's short-lived client process is asked.

Every request is checked against the approved terms and the policy, answered from the outbox or by
work, and written to the log of what left before it leaves.  A refusal is an answer too: its reason
is told to the coordinator without anything of the participant's files in it, and kept in full here.

    python -m meadow.client.resident_trainer --folder CLIENT_HOME --ready FILE
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..closeable import Closeable
from ..errors import (
    ConfigError,
    MeadowError,
    PolicyError,
    StorageError,
    TrainerError,
)
from ..service_process import ENDING, service_process
from ..store import Disk, digest_of, locked
from .home import (
    MEMBERSHIP,
    OUTBOX,
    OUTGOING,
    PAUSED,
    POLICY,
    SOCKET,
    read_text,
    require_private,
    terms_in,
)
from .incoming import read_turn
from .member import Member
from .outgoing_log import OutgoingLog
from .policy import Policy, Used
from .refusals import DEFECT, TOLD, outward
from .rehearsal import DryOutbox, describe, first_message, list_tensors
from .trainer_link import DRY_RUN, STATUS, TRAIN, VERBS
from .trainer_socket import TrainerSocket
from .work_limits import Stopping, WorkLimits, resident_mb
from .workplace import Workplace

DAY = 86400.0  # seconds

_MOST_WAITING = 4  # requests for work at once, so that others are always answered
_RECENT = 32
log = logging.getLogger(__name__)


@dataclass
class Request:
    """One request in progress, or one that was answered."""

    verb: str
    received: int  # bytes
    since: float  # unix seconds
    round: int = 0
    steps: int = 0
    seconds: float = 0.0
    loading_seconds: float = 0.0  # of these, spent on reading base and text
    outcome: str = "working"


class ResidentTrainer(Closeable):
    """One participant in one run.  Threads may share it; work is done one request at a time."""

    def __init__(
        self, folder: Path, disk: Disk | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError, FormatError, IdentityError, PolicyError or JournalError for a folder
        that it cannot work in."""
        self._folder, self._clock = folder, clock
        require_private(folder)
        self._name = _name_in(folder / MEMBERSHIP)
        self._terms = terms_in(folder)
        self._policy().check_terms(self._terms)
        self._held = ExitStack()
        self._held.enter_context(locked(folder / "trainer.lock", "its trainer runs already"))
        disk = disk or Disk()
        try:
            self._log = OutgoingLog(folder / OUTGOING, disk, clock)
        except BaseException:
            self._held.close()
            raise
        place = Workplace(folder, self._name, self._terms, disk, self._progress)
        self._place = self._held.enter_context(place)
        self._dry = DryOutbox(folder / OUTBOX, self._name, self._terms.run, disk)
        self._stop = threading.Event()
        self._work, self._waiting = threading.Lock(), threading.BoundedSemaphore(_MOST_WAITING)
        self._current: Request | None = None
        self._limits: WorkLimits | None = None
        self._recent: deque[Request] = deque(maxlen=_RECENT)
        self._fault = ""

    def close(self) -> None:
        self._held.close()

    def stop(self) -> None:
        """Let work in progress end at its next step."""
        self._stop.set()

    def warm(self) -> None:
        """Load base and text before the first request; a fault shows in the status."""
        with self._work:
            try:
                self._place.member(self._policy())
                self._fault = ""
            except MeadowError as error:
                log.error("%s", error)
                self._fault = str(error)

    def handle(self, verb: str, body: bytes, wanted: Callable[[], bool] = lambda: True) -> bytes:
        """Answer one request, if its caller still waits when its turn has come.

        Raises TrainerError with what may be told to the coordinator, and Stopping at the end.
        """
        if verb not in VERBS:
            raise TrainerError(f"there is no verb {verb!r}", f"known: {', '.join(VERBS)}")
        if verb == STATUS:
            return json.dumps(self.status(), sort_keys=True).encode()
        with self._one_at_a_time(verb, body, wanted) as request:
            if verb == DRY_RUN:
                return json.dumps(self._rehearse(body, request)).encode()
            return self._answer(body, request)

    def status(self) -> dict[str, Any]:
        """What this process is doing and has done."""
        current, loaded = self._current, self._place.loaded
        text = {"loads": asdict(self._place.text_loads), "digest": "", "train": 0, "held_out": 0}
        if loaded is not None:
            person = loaded.person
            text |= {"digest": loaded.text.digest, "truncated": loaded.truncated}
            text |= {"train": len(person.train), "held_out": len(person.held_out)}
        return {
            "meadow": __version__,
            "pid": os.getpid(),
            "name": self._name,
            "run": self._terms.run,
            "paused": (self._folder / PAUSED).exists(),
            "fault": self._fault,
            "base": {"digest": self._terms.base_digest, "loads": asdict(self._place.base_loads)},
            "text": text,
            "memory_mb": round(resident_mb(), 1),
            "working": None if current is None else asdict(current),
            "recent": [asdict(request) for request in list(self._recent)],
            "outgoing_head": self._log.head,
        }

    @contextmanager
    def _one_at_a_time(
        self, verb: str, body: bytes, wanted: Callable[[], bool]
    ) -> Iterator[Request]:
        if not self._waiting.acquire(blocking=False):
            raise TrainerError("the trainer has too many requests at once")
        try:
            with self._work:
                if not wanted():
                    raise TrainerError("the caller has gone")
                with self._measured(Request(verb, len(body), self._clock())) as request:
                    yield request
        finally:
            self._waiting.release()

    @contextmanager
    def _measured(self, request: Request) -> Iterator[Request]:
        begun, loading = time.perf_counter(), self._place.loading_seconds
        self._current = request
        try:
            yield request
            request.outcome = "answered"
        except MeadowError as error:
            request.outcome = str(error)
            raise
        except Exception as error:
            request.outcome = f"defect: {error!r}"
            raise
        finally:
            request.seconds = round(time.perf_counter() - begun, 4)
            request.loading_seconds = round(self._place.loading_seconds - loading, 4)
            self._current = self._limits = None
            self._recent.append(request)

    def _answer(self, body: bytes, request: Request) -> bytes:
        try:
            answer = self._worked(body, request)
        except Stopping:
            raise
        except MeadowError as error:
            log.warning("%s of round %d is refused: %s", request.verb, request.round, error)
            if not isinstance(error, TOLD):
                self._fault = str(error)  # something here to mend: it shows in the status
            raise self._refused(request, outward(error, self._folder), str(error)) from error
        except Exception as error:
            log.exception("%s of round %d met a defect", request.verb, request.round)
            raise self._refused(request, DEFECT, repr(error)) from error
        self._fault = ""
        return answer

    def _worked(self, body: bytes, request: Request) -> bytes:
        training = request.verb == TRAIN
        turn = read_turn(body, self._terms, self._name, training)
        request.round = turn.round
        policy, used = self._policy(), self._used(turn.round)
        self._require_running()
        policy.check_terms(self._terms)
        policy.check_turn(turn, len(body), self._now(), used, training)
        member = self._member(policy)
        answer = member.work(body) if training else member.evaluate(body)
        policy.check_answer(len(answer), used)
        self._note(request, answer, describe(answer))
        return answer

    def _rehearse(self, body: bytes, request: Request) -> dict[str, Any]:
        """What would be sent in answer to a message, or to round 1 where none is given."""
        policy, refusal = self._policy(), ""
        policy.check_terms(self._terms)
        member = self._member(policy, self._dry)
        message = body or first_message(member.strategy, self._terms, self._name)
        turn = read_turn(message, self._terms, self._name, training=True)
        request.round, used = turn.round, self._used(turn.round)
        try:
            if body:
                policy.check_turn(turn, len(body), self._now(), used)
                self._require_running()
        except PolicyError as error:
            refusal = str(error)
        answer = member.work(message)
        try:
            policy.check_answer(len(answer), used)
        except PolicyError as error:
            refusal = refusal or str(error)
        return {
            "round": turn.round,
            "message": "given" if body else "as round 1 would send it",
            "refusal": refusal,
            "bytes": len(answer),
            "sha256": digest_of(answer),
            "about": describe(answer),
            "contents": list_tensors(answer),
        }

    def _member(self, policy: Policy, outbox: DryOutbox | None = None) -> Member:
        """The member, its work within the policy's limits; loading does not count as work."""
        member = self._place.member(policy, outbox)
        self._limits = WorkLimits(policy, self._stop)
        return member

    def _progress(self, steps: int) -> None:
        """Told by the trainer after every step, and before every request of a strategy."""
        limits, current = self._limits, self._current
        if limits is not None:
            if current is not None:
                current.steps += steps
            limits.step(steps)

    def _refused(self, request: Request, reason: str, detail: str) -> TrainerError:
        """A refusal, once the log holds what it tells."""
        try:
            self._note(request, reason.encode(), {"reason": reason, "detail": detail})
        except StorageError as error:
            log.error("%s", error)
            return TrainerError(outward(error, self._folder))  # the one text that leaves unlogged
        return TrainerError(reason)

    def _note(self, request: Request, data: bytes, about: Mapping[str, Any]) -> None:
        refused = "reason" in about
        self._log.append(
            "refusal" if refused else "train" if request.verb == TRAIN else "evaluate",
            data,
            run=self._terms.run,
            round=request.round,
            received=request.received,
            about={"verb": request.verb, **about} if refused else about,
        )

    def _used(self, round: int) -> Used:
        run = self._terms.run
        today = self._log.rounds_since(self._clock() - DAY, but=(run, round))
        return Used(today, self._log.received(run, round), self._log.sent(run, round))

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock())

    def _policy(self) -> Policy:
        """Read anew for every request: its owner may have changed it."""
        return Policy.load(self._folder / POLICY)

    def _require_running(self) -> None:
        if (self._folder / PAUSED).exists():
            raise PolicyError("the participant has paused", "`meadow client resume` goes on")


def _name_in(path: Path) -> str:
    """The name under which this participant was enrolled."""
    try:
        match json.loads(read_text(path)):
            case {"name": str(name)} if name:
                return name
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}", "`meadow client join` writes it"
        ) from error
    raise ConfigError(f"{path} names no participant", "`meadow client join` writes it")


def serve(folder: Path, ready: Path | None, stop: threading.Event) -> None:
    """Answer at the folder's socket until told to stop; `ready` appears once all is loaded."""
    with ResidentTrainer(folder) as trainer, TrainerSocket(folder / SOCKET, trainer.handle):
        trainer.warm()
        if ready is not None:
            Disk().write(ready, json.dumps({"pid": os.getpid()}).encode(), 0o600)
        stop.wait()
        trainer.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """The process: ends at SIGTERM or SIGINT, with status 2 for a mistake of its user."""
    parser = argparse.ArgumentParser(prog="meadow.client.resident_trainer")
    parser.add_argument("--folder", type=Path, required=True, help="the participant's folder")
    parser.add_argument("--ready", type=Path, help="a file to write once all is loaded")
    chosen = parser.parse_args(arguments)
    os.umask(0o077)
    stop = threading.Event()
    for number in ENDING:
        signal.signal(number, lambda *_: stop.set())
    with service_process():
        serve(chosen.folder.absolute(), chosen.ready, stop)


if __name__ == "__main__":
    main()
