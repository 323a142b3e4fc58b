"""Who is served next: the virtual token counter (Sheng et al., arXiv:2401.00588, algorithm 2).

Each tenant's counter grows by what it was served: 1 for a token of its prompts, 2 for a generated
one.  The tenant with the smallest counter goes first, so that of two that always have something
waiting neither gets ahead by more than a bounded amount, however much more one of them asks for.
A tenant that comes back from a pause is lifted to the least of those that wait, or, where nobody
does, to the one who waited last: it cannot have saved up a turn.  Nobody waits while there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a token


class Waiting(Protocol):
    """What a queue has to know of a request."""

    @property
    def tenant(self) -> str: ...

    @property
    def input_length(self) -> int:
        """Tokens of its prompt."""

    @property
    def aborted(self) -> bool: ...


R = TypeVar("R", bound=Waiting)


class FairQueue(Generic[R]):
    """Requests that wait, first come first served within a tenant."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._queues: dict[str, deque[R]] = {}
        self._last = ""  # the tenant whose request left the queue last, if any did

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[R]:
        return (request for queue in self._queues.values() for request in queue)

    def arrive(self, request: R) -> None:
        """Queue a request; a tenant without any is lifted first."""
        own, tenant = self._queues.setdefault(request.tenant, deque()), request.tenant
        served = self.served.setdefault(tenant, 0.0)
        if not own:
            self.served[tenant] = max(served, self._least())
        own.append(request)

    def _least(self) -> float:
        """What nobody begins below: an empty queue may well be a busy engine's."""
        waiting = [self.served[name] for name, queue in self._queues.items() if queue]
        return min(waiting, default=self.served.get(self._last, 0.0))

    def admit(self, fits: Callable[[R], bool]) -> Iterator[R]:
        """Requests to begin with now, in order; the first that does not fit ends it.

        `fits` is asked once the one before was taken.
        """
        while waiting := [name for name, queue in self._queues.items() if queue]:
            tenant = min(waiting, key=lambda name: self.served[name])
            request = self._queues[tenant][0]
            if not fits(request):
                return
            self._queues[tenant].popleft()
            self.served[tenant] += INPUT_WEIGHT * request.input_length
            self._last = tenant
            yield request

    def drop(self) -> list[R]:
        """Take out what was aborted."""
        found = [request for request in self if request.aborted]
        for request in found:
            self._queues[request.tenant].remove(request)
        return found

    def charge(self, tenant: str) -> None:
        """One token is about to be generated for a tenant by decoding; a prompt's own is free."""
        self.served[tenant] += OUTPUT_WEIGHT


def kv_peak(requests: Iterator[tuple[int, int]]) -> int:
    """The most tokens that (length now, tokens to come) pairs will hold at once, if each ends at
    its last token: section 4 of the S-LoRA scheduler."""
    peak = total = 0
    for count, (length, remaining) in enumerate(
        sorted(requests, key=lambda pair: -pair[1]), start=1
    ):
        total += length
        peak = max(peak, remaining * count + total)
    return peak
