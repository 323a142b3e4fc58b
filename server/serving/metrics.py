"""What Prometheus reads: vLLM's names where it has them, and `meadow:` for the rest.

Text format 0.0.4.  Labels come from small fixed sets, except for the adapters that run or wait,
of which there is one series.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from .catalogue import Health
from .engine import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_QUEUED = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    20,
    40,
    60,
    120,
)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480)


class Histogram:
    """Counts of values, in buckets by their upper bounds; seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        totals = list(accumulate(self._counts))
        for bound, total in zip(bounds, totals, strict=True):
            yield _line(f"{name}_bucket", {**labels, "le": bound}, total)
        yield _line(f"{name}_sum", labels, self._sum)
        yield _line(f"{name}_count", labels, totals[-1])


class Meters:
    """What the HTTP front counts itself; used on the event loop's thread."""

    def __init__(self) -> None:
        self.first_token = Histogram(_FIRST)
        self.between_tokens = Histogram(_BETWEEN)
        self.queued = Histogram(_QUEUED)
        self.whole = Histogram(_WHOLE)
        self.finished: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        """By HTTP's status."""

    def ended(self, reason: str, seconds: float) -> None:
        self.finished[reason] += 1
        self.whole.observe(seconds)


def page(base: str, stats: Stats, health: Health, meters: Meters, in_flight: int) -> str:
    """All of it; `base` is the base model's name, `in_flight` counts HTTP requests."""
    lines = [*_engine(base, stats), *_times({"model_name": base}, meters)]
    lines += [*_adapters(stats), *_registry(health), *_http(meters, in_flight)]
    return "\n".join(lines) + "\n"


def _engine(base: str, stats: Stats) -> Iterator[str]:
    model = {"model_name": base}
    usage = stats.kv_used / stats.kv_tokens if stats.kv_tokens else 0.0
    yield from _gauge("vllm:num_requests_running", "In the batch.", stats.running, model)
    yield from _gauge("vllm:num_requests_waiting", "In the queue.", stats.waiting, model)
    yield from _gauge("vllm:kv_cache_usage_perc", "1 is all of it.", usage, model)
    for name, about, value in (
        ("vllm:prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
        ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
        ("vllm:prefix_cache_queries", "Tokens of prompts looked up.", stats.prompt_tokens),
        ("vllm:prefix_cache_hits", "Tokens of prompts not computed anew.", stats.cached_tokens),
        ("meadow:engine_steps", "Forward passes.", stats.steps),
        ("meadow:engine_steps_replayed", "Of those, by a CUDA graph.", stats.replayed_steps),
    ):
        yield from _counter(name, about, [(model, value)])
    about = "1: a step could not be recorded as a CUDA graph, and no other will be."
    yield from _gauge("meadow:recording_failed", about, int(stats.recording_failed), model)


def _times(model: Mapping[str, str], meters: Meters) -> Iterator[str]:
    for name, about, histogram in (
        ("vllm:time_to_first_token_seconds", "From arrival.", meters.first_token),
        ("vllm:inter_token_latency_seconds", "From token to token.", meters.between_tokens),
        ("vllm:request_queue_time_seconds", "From arrival to the batch.", meters.queued),
        ("vllm:e2e_request_latency_seconds", "From arrival to the end.", meters.whole),
    ):
        yield from _head(name, about, "histogram")
        yield from histogram.lines(name, model)
    ended = [({**model, "finished_reason": r}, n) for r, n in sorted(meters.finished.items())]
    yield from _counter("vllm:request_success", "Answers, by how they ended.", ended)


def _adapters(stats: Stats) -> Iterator[str]:
    loads = {
        "max_lora": str(stats.slots),
        "running_lora_adapters": ",".join(a.model for a in stats.adapters if a.running),
        "waiting_lora_adapters": ",".join(a.model for a in stats.adapters if a.waiting),
    }
    about = "What runs and waits now; the value is the time, Unix seconds."
    yield from _gauge("vllm:lora_requests_info", about, round(time.time(), 3), loads)
    yield from _gauge("meadow:adapter_slots", "Ready for a batch at once.", stats.slots)
    yield from _gauge("meadow:adapter_slots_used", "Slots that hold one.", stats.slots_used)
    yield from _gauge("meadow:adapter_cache_bytes", "In memory, beside slots.", stats.cache_bytes)
    yield from _gauge("meadow:adapter_cache_limit_bytes", "At most.", stats.cache_limit)
    for name, about, value in (
        ("meadow:adapter_slot_hits", "Requests whose adapter was in a slot.", stats.slot_hits),
        ("meadow:adapter_slot_misses", "Requests that had to load it.", stats.slot_misses),
        ("meadow:adapter_slot_evictions", "Slots given to another.", stats.slot_evictions),
        ("meadow:adapter_cache_hits", "Loads without the disk.", stats.cache_hits),
        ("meadow:adapter_cache_misses", "Loads from the disk.", stats.cache_misses),
        ("meadow:adapter_cache_evictions", "Dropped from memory.", stats.cache_evictions),
    ):
        yield from _counter(name, about, [({}, value)])


def _registry(health: Health) -> Iterator[str]:
    yield from _gauge("meadow:registry_up", "1: it can be read.", int(not health.registry))
    about = "Aliases that answer with an earlier version, because theirs does not verify."
    yield from _gauge("meadow:aliases_behind", about, len(health.behind))
    yield from _counter("meadow:versions_refused", "Did not verify.", [({}, health.refused)])


def _http(meters: Meters, in_flight: int) -> Iterator[str]:
    yield from _gauge("meadow:http_requests_in_flight", "Being answered.", in_flight)
    answers = [({"status": str(status)}, count) for status, count in sorted(meters.answers.items())]
    yield from _counter("meadow:http_answers", "By HTTP's status.", answers)


def _gauge(
    name: str, about: str, value: float, labels: Mapping[str, str] | None = None
) -> Iterator[str]:
    yield from _head(name, about, "gauge")
    yield _line(name, labels or {}, value)


def _counter(
    name: str, about: str, values: Iterable[tuple[Mapping[str, str], float]]
) -> Iterator[str]:
    yield from _head(f"{name}_total", about, "counter")
    for labels, value in values:
        yield _line(f"{name}_total", labels, value)


def _head(name: str, about: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{told}}} {value!r}" if told else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
