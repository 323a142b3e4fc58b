"""Versions that change under load, and adapters that are many: what fails, and what is mixed up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from ..server.registry import Registry
from ..server.serving.engine import EngineOptions, Stats
from .random_llama import TINY, random_prompt
from .serve_registry import Answer, Server, publish, registry_of, server_over, tiny_base

NAME = "tenant/news"
_RANKS = (8, 64)
_LENGTH = 24  # tokens of an answer
_CLIENTS = 6
_PROMPTS = [random_prompt(TINY, length, length) for length in (3, 9, 14)]

Key = tuple[str, int]  # a version and a prompt


@dataclass(frozen=True)
class Swaps:
    """What became of the requests while an alias moved."""

    swaps: int
    answers: int
    failed: int
    mixed: int  # answers other than their version gives alone
    versions: int  # that answered
    distinct: int  # answers that the versions give alone to one prompt, at least
    first_error: str = ""


@dataclass(frozen=True)
class Many:
    """What became of requests to many adapters."""

    adapters: int
    answers: int
    failed: int
    stats: Stats
    seconds: tuple[float, float]  # the median's and the slowest percent's latency
    first_error: str = ""

    @property
    def hit_rate(self) -> float:
        """How often an adapter was in its slot already."""
        return self.stats.slot_hits / max(1, self.stats.slot_hits + self.stats.slot_misses)


def measure_swaps(swaps: int, versions: int = 6, *, awaited: bool = True) -> Swaps:
    """Move an alias between versions while clients ask for it; compare each answer's tokens with
    those of its version alone.

    Each move is `awaited` until somebody is answered by it: else the load would see few of many.
    """
    base, options = tiny_base(), EngineOptions(max_rows=4, slots=3, prefill_tokens=8)
    with TemporaryDirectory() as root, registry_of(Path(root), base) as (registry, blueprint):
        for seed in range(versions):
            rank = _RANKS[seed % 2]
            publish(registry, blueprint, Path(root, f"{seed}"), NAME, rank, seed)
        registry.promote(f"{NAME}@v1")
        with server_over(registry, blueprint, base, options) as server:
            alone = {
                (f"v{number}", at): server.ask(f"{NAME}@v{number}", prompt, _LENGTH).tokens
                for number in range(1, versions + 1)
                for at, prompt in enumerate(_PROMPTS)
            }
            moves = _moves(registry, server, swaps, versions, awaited=awaited)
            answers = _answers_during(server, moves)
    return _judged(swaps, answers, alone)


def _answers_during(server: Server, moves: Callable[[], None]) -> list[tuple[int, Answer]]:
    """Every answer that began while the alias moved, with its prompt's number."""
    ended = threading.Event()

    def client(number: int) -> list[tuple[int, Answer]]:
        heard, draw = [], random.Random(number)
        while not ended.is_set():
            at = draw.randrange(len(_PROMPTS))
            heard.append((at, server.ask(NAME, _PROMPTS[at], _LENGTH, f"{number}")))
        return heard

    with ThreadPoolExecutor(_CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(_CLIENTS)]
        try:
            moves()
        finally:
            ended.set()
        return [heard for done in clients for heard in done.result()]


def _moves(
    registry: Registry, server: Server, swaps: int, versions: int, *, awaited: bool
) -> Callable[[], None]:
    """Promotions, and every fifth time a rollback."""

    def move() -> None:
        draw, now = random.Random(0), 1
        for swap in range(swaps):
            if swap % 5 == 4:
                now = registry.rollback(NAME).number
            else:
                now = draw.choice([n for n in range(1, versions + 1) if n != now])
                registry.promote(f"{NAME}@v{now}")
            while awaited and server.ask(NAME, _PROMPTS[0], 1, "mover").version != f"v{now}":
                pass

    return move


def _judged(
    swaps: int, answers: Sequence[tuple[int, Answer]], alone: dict[Key, list[int]]
) -> Swaps:
    failed = [answer for _, answer in answers if answer.error]
    mixed = [
        answer
        for at, answer in answers
        if not answer.error and answer.tokens != alone[answer.version, at]
    ]
    distinct = min(
        len({tuple(tokens) for (_, at), tokens in alone.items() if at == prompt})
        for prompt in range(len(_PROMPTS))
    )
    return Swaps(
        swaps,
        len(answers),
        len(failed),
        len(mixed),
        len({answer.version for _, answer in answers}),
        distinct,
        failed[0].error if failed else "",
    )


def measure_many(adapters: int, requests: int) -> Many:
    """Ask for adapters that a power law draws, of more than the slots and the cache hold."""
    base = tiny_base()
    with TemporaryDirectory() as root, registry_of(Path(root), base) as (registry, blueprint):
        for seed in range(adapters):
            folder = Path(root, f"{seed}")
            version = publish(registry, blueprint, folder, f"a{seed}", _RANKS[seed % 8 == 7], seed)
            registry.promote(version)
        bytes_each = version.bytes
        options = EngineOptions(max_rows=16, slots=64, cache_bytes=200 * bytes_each)
        with server_over(registry, blueprint, base, options) as server:
            answers = _answers_of(server, _drawn(adapters, requests))
            stats = server.engine.stats()
    seconds = quantiles((answer.seconds for answer in answers), n=100)
    failed = [answer for answer in answers if answer.error]
    error = failed[0].error if failed else ""
    figures = stats, (seconds[49], seconds[98])
    return Many(adapters, len(answers), len(failed), *figures, error)


def _drawn(adapters: int, requests: int) -> list[int]:
    """Adapter k with a probability that falls as 1 / (k + 1) (Zipf's law)."""
    weights = [1 / (number + 1) for number in range(adapters)]
    return random.Random(0).choices(range(adapters), weights, k=requests)


def _answers_of(server: Server, numbers: Sequence[int]) -> list[Answer]:
    def ask(number: int) -> Answer:
        return server.ask(f"a{number}", random_prompt(TINY, 12, number), 8)

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(ask, numbers))
