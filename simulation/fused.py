"""The meeting point of a fused group: clients' requests wait until all of the group have asked,
and are then answered by one pass over the base model."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

from ..client.task import Participant, answer
from ..client.trainer import Trainer, shared_pass
from ..errors import MeadowError
from ..strategies.base import Answer, Probe, Request, Sgd

log = logging.getLogger(__name__)


class Rendezvous:
    """Each member of a group runs in its own thread; `open` says how many will come."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._changed = threading.Condition()
        self._expected = 0
        self._posted: dict[str, tuple[Participant, Request]] = {}
        self._answers: dict[str, Answer | BaseException] = {}

    def open(self, count: int) -> None:
        """A new group of `count` members begins."""
        self._expected = count

    def leave(self) -> None:
        """A member has finished and will ask no more."""
        with self._changed:
            self._expected -= 1
            self._answer_all_if_complete()

    def responder(self, participant: Participant) -> Callable[[Request], Answer]:
        """The function that answers this participant's requests."""

        def respond(request: Request) -> Answer:
            with self._changed:
                self._posted[participant.name] = (participant, request)
                self._answer_all_if_complete()
                self._changed.wait_for(lambda: participant.name in self._answers)
                found = self._answers.pop(participant.name)
            if isinstance(found, BaseException):
                raise found
            return found

        return respond

    def _answer_all_if_complete(self) -> None:
        if not self._posted or len(self._posted) < self._expected:
            return
        posted, self._posted = dict(sorted(self._posted.items())), {}
        alike: dict[object, list[str]] = defaultdict(list)
        for name, (_, request) in posted.items():
            alike[_kind(name, request)].append(name)
        for names in alike.values():
            self._answers |= self._together({name: posted[name] for name in names})
        self._changed.notify_all()

    def _together(
        self, posted: dict[str, tuple[Participant, Request]]
    ) -> dict[str, Answer | BaseException]:
        """One pass for requests that may share it; where one of them fails, each by itself, so
        that only the guilty one's fails."""
        if len(posted) > 1:
            try:
                return dict(zip(posted, self._pass(list(posted.values())), strict=True))
            except MeadowError:
                pass  # found again below, alone and by name
            except Exception:  # nobody may be left waiting, and nothing may be hidden
                log.warning("the fused pass failed; its clients train alone", exc_info=True)
        return {name: self._alone(person, request) for name, (person, request) in posted.items()}

    def _pass(self, posted: list[tuple[Participant, Request]]) -> Sequence[Answer]:
        """One pass for requests of one kind."""
        steps = [person.job(request) for person, request in posted if isinstance(request, Sgd)]
        probes = [person.job(request) for person, request in posted if isinstance(request, Probe)]
        return self._trainer.sgd(steps) if steps else self._trainer.probe(probes)

    def _alone(self, person: Participant, request: Request) -> Answer | BaseException:
        try:
            return answer(request, person, self._trainer)
        except Exception as error:  # handed to the thread that asked, which raises it
            return error


def _kind(name: str, request: Request) -> object:
    """Requests of one kind may be answered in one pass."""
    if isinstance(request, Sgd):
        return shared_pass(request)
    if isinstance(request, Probe):
        return request.pool
    return name
