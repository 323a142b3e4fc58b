"""Whatever else is in the batch, a request gets the tokens that it would get alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from served_models import (
    LENGTH,
    RANKS,
    VOCABULARY,
    Desk,
    all_sites,
    model_of,
    random_tree,
    small_base,
    small_runner,
    text_of,
    tokens_of,
)

from meadow.peft_adapters import serving_slots
from meadow.peft_adapters.slot_group import SlotGroup
from meadow.server.serving.model_runner import ModelRunner
from meadow.server.serving.requests import Failed, Finished, PromptRead, Sampling, Token

PROMPTS = st.lists(st.integers(2, 30), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    with small_runner() as runner:
        yield runner


@cache
def reference(prompt: tuple[int, ...], model: int, count: int) -> list[int]:
    """What transformers' own `generate` says, with PEFT's adapter in the model."""
    ids = torch.tensor([prompt])
    answer = peft_model(model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=True,
    )
    found: list[int] = answer[0, len(prompt) :].tolist()
    return found


@cache
def peft_model(model: int) -> Any:
    base = small_base()
    if not model:
        return base.model
    places, rank = all_sites(base), RANKS[model % len(RANKS)]
    targets = sorted({site.name.rpartition(".")[2] for site in places})
    adapted = get_peft_model(
        base.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    )
    for key, value in random_tree(places, rank, model).items():
        module, _, factor = key.rpartition(".")
        layer = adapted.get_submodule(f"base_model.model.{module}.{factor}.default")
        layer.weight.data.copy_(value)
    return adapted.eval()


ASKED = st.tuples(
    PROMPTS,
    st.integers(0, 6),  # the adapter: more of them than slots
    st.integers(1, 12),  # tokens wanted
    st.integers(0, 3),  # steps before the next one arrives
    st.integers(0, 9),  # after how many events the client goes away, if fewer come
)


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=10),
    prefill_tokens=st.integers(1, 40),
    slots=st.integers(1, 3),
)
def test_tokens_are_those_of_each_request_alone(
    runner: ModelRunner, asked: list[Any], prefill_tokens: int, slots: int
) -> None:
    """Over random arrivals and departures, chunks of prompts, adapters and slots to hold them."""
    desk = Desk(runner, slots=slots, prefill_tokens=prefill_tokens)
    told = []
    for prompt, model, count, steps, patience in asked:
        request, events = desk.ask(prompt, Sampling(count, temperature=0), model)
        told.append((request, events, patience))
        for _ in range(steps):
            desk.batcher.step()
            for other, heard, most in told:
                other.aborted |= len(heard) > most
    desk.finish()
    for (prompt, model, count, _, _), (request, events, _) in zip(asked, told, strict=True):
        expected = reference(tuple(prompt), model, count)
        found, last = tokens_of(events), events[-1]
        assert isinstance(last, Finished) and last.completion_tokens == len(found)
        if last.reason == "abort":
            assert request.aborted and found == expected[: len(found)]
        else:
            assert found == expected
    assert not desk.batcher.running and desk.batcher.kv_used == 0
    assert not any(desk.cache.held.values())
    assert runner.kv.free == len(runner.kv.rows)


def test_a_prefix_is_reused_within_an_adapter_and_a_tenant_only(runner: ModelRunner) -> None:
    desk, prompt = Desk(runner), list(range(2, 26))
    for model, tenant, cached in [
        (1, "ada", 0), (1, "ada", 23), (2, "ada", 0), (0, "ada", 0), (1, "bob", 0),
        (0, "ada", 23), (2, "ada", 23),
    ]:  # fmt: skip  # who has asked nothing before
        _, events = desk.ask(prompt, Sampling(4, temperature=0), model, tenant)
        desk.finish()
        last = events[-1]
        assert isinstance(last, Finished) and last.cached_tokens == cached
        assert tokens_of(events) == reference(tuple(prompt), model, 4)


def test_a_running_neighbour_shares_its_prefix(runner: ModelRunner) -> None:
    desk, prompt = Desk(runner), [9, *range(2, 26)]
    _, first = desk.ask(prompt, Sampling(12, temperature=0), 1)
    for _ in range(3):
        desk.batcher.step()
    longer = [*prompt, 7, 7]
    _, second = desk.ask(longer, Sampling(5, temperature=0), 1)
    desk.finish()
    assert isinstance(second[-1], Finished) and second[-1].cached_tokens == len(prompt)
    assert tokens_of(first) == reference(tuple(prompt), 1, 12)
    assert tokens_of(second) == reference(tuple(longer), 1, 5)


def test_a_cancelled_request_leaves_at_the_next_step(runner: ModelRunner) -> None:
    desk = Desk(runner)
    request, events = desk.ask([2, 3], Sampling(50, temperature=0, ignore_eos=True), 1)
    for _ in range(4):
        desk.batcher.step()
    request.aborted = True
    desk.batcher.step()
    assert isinstance(events[-1], Finished) and events[-1].reason == "abort"
    assert len(tokens_of(events)) == events[-1].completion_tokens == 4
    assert not desk.batcher.running and not desk.batcher.step()


def test_a_waiting_request_that_is_cancelled_never_runs(runner: ModelRunner) -> None:
    desk = Desk(runner, slots=1)
    desk.ask([2, 3], Sampling(5, temperature=0, ignore_eos=True), 4)
    waits, events = desk.ask([2, 3], Sampling(5, temperature=0), 8)  # the same rank: no slot
    desk.batcher.step()
    waits.aborted = True
    desk.finish()
    assert events == [Finished("abort", "", 2, 0, 0)]
    assert not any(desk.cache.held.values())


def test_an_adapter_that_gives_no_numbers_harms_nobody(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests fail; its neighbours' tokens, and those of who has its row next, stay right."""
    desk, prompt = Desk(runner), (3, 4, 5, 6)
    broken = desk.cache.get(model_of(5))
    bad = type(broken)(broken.rank, torch.full_like(broken.a, torch.inf), broken.b, broken.modules)
    own = desk.cache.get
    monkeypatch.setattr(desk.cache, "get", lambda m: bad if m.name == "a5" else own(m))
    told = [desk.ask(prompt, Sampling(6, temperature=0), model)[1] for model in (5, 1, 0, 5, 2)]
    desk.finish()
    assert [type(events[-1]).__name__ for events in told] == [
        "Failed", "Finished", "Finished", "Failed", "Finished",
    ]  # fmt: skip
    assert isinstance(told[0][0], Failed) and "not finite" in told[0][0].error
    assert len(told[0]) == 1
    for _ in range(2):  # in every row there is
        told = [desk.ask(prompt, Sampling(6, temperature=0), 1, f"{n}")[1] for n in range(6)]
        desk.finish()
        assert {tuple(tokens_of(events)) for events in told} == {tuple(reference(prompt, 1, 6))}


@settings(max_examples=25, deadline=None)
@given(
    neighbours=st.lists(st.tuples(PROMPTS, st.integers(0, 4)), max_size=5),
    sampling=st.builds(
        Sampling,
        st.just(8),
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_p=st.sampled_from([1.0, 0.7]),
        top_k=st.sampled_from([0, 5]),
        min_p=st.sampled_from([0.0, 0.05]),
        seed=st.integers(-5, 2**70),
    ),
)
def test_a_seed_gives_the_same_tokens_in_any_company(
    runner: ModelRunner, neighbours: list[Any], sampling: Sampling
) -> None:
    desk, prompt = Desk(runner), [5, 6, 7]
    _, alone = desk.ask(prompt, sampling, 1)
    desk.finish()
    for other, model in neighbours:
        desk.ask(other, Sampling(6, temperature=1.0), model)
    _, accompanied = desk.ask(prompt, sampling, 1)
    desk.finish()
    assert tokens_of(alone) == tokens_of(accompanied)


def test_log_probabilities_are_the_models_own(runner: ModelRunner) -> None:
    """Before temperature, whatever was drawn."""
    desk, prompt = Desk(runner), (4, 5, 6)
    _, events = desk.ask(prompt, Sampling(5, temperature=3.0, seed=2, logprobs=3), 2)
    desk.finish()
    tokens = tokens_of(events)
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        expected = peft_model(2)(input_ids=ids).logits[0].log_softmax(-1)
    for at, event in enumerate(events[:-1], start=len(prompt) - 1):
        assert isinstance(event, Token)
        assert event.logprob == pytest.approx(float(expected[at, event.id]), abs=1e-4)
        values, likeliest = expected[at].topk(3)
        assert [token for token, _ in event.top] == likeliest.tolist()
        assert [p for _, p in event.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_an_answer_ends_at_a_stop_string_that_spans_tokens(runner: ModelRunner) -> None:
    """And nothing of the stop string is shown, nor anything after it."""
    desk, prompt = Desk(runner), (2, 9, 4)
    sampling = Sampling(40, temperature=0, ignore_eos=True)
    _, events = desk.ask(prompt, sampling, 3)
    desk.finish()
    whole = text_of(events)
    stop = whole[9:12]
    _, events = desk.ask(prompt, Sampling(40, temperature=0, ignore_eos=True, stop=(stop,)), 3)
    desk.finish()
    assert text_of(events) == whole[: whole.index(stop)]
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop"


def test_the_end_token_is_told_and_has_no_text(runner: ModelRunner) -> None:
    desk = Desk(runner)
    ends = set(range(VOCABULARY))
    request, events = desk.ask([5, 6], Sampling(9, temperature=0), 1)
    request._ends = ends  # whatever comes ends it
    desk.finish()
    assert [type(event).__name__ for event in events] == ["Token", "Finished"]
    assert text_of(events) == "" and events[1].reason == "stop"  # type: ignore[union-attr]


def test_no_more_tokens_than_the_budget_are_in_flight(runner: ModelRunner) -> None:
    desk = Desk(runner, kv_tokens=60)
    for number in range(8):
        desk.ask(
            [2] * (5 + number), Sampling(20, temperature=0, ignore_eos=True), tenant=f"{number}"
        )
    most = 0
    while desk.batcher.step():
        most = max(most, sum(len(row.tokens) for row in runner.kv.rows if row.busy))
    assert 30 < most <= 60
    assert desk.batcher.finished["length"] == 8


def test_a_long_prompt_is_read_in_parts_while_others_go_on(runner: ModelRunner) -> None:
    desk = Desk(runner, prefill_tokens=8)
    _, quick = desk.ask([3, 4], Sampling(40, temperature=0, ignore_eos=True))
    desk.batcher.step()
    _, long = desk.ask([5] * 60, Sampling(2, temperature=0, ignore_eos=True))
    for _ in range(7):
        desk.batcher.step()
    assert not long and len(tokens_of(quick)) == 8
    desk.finish()
    assert tokens_of(long) == reference((5,) * 60, 0, 2)


def test_a_listener_that_fails_ends_its_own_request_alone(runner: ModelRunner) -> None:
    desk = Desk(runner)
    deaf, _ = desk.ask([3, 4], Sampling(9, temperature=0))
    deaf._on_event = lambda event: 1 / 0  # type: ignore[assignment]
    _, events = desk.ask([3, 4], Sampling(9, temperature=0, ignore_eos=True), 1)
    desk.finish()
    assert len(tokens_of(events)) == 9 and deaf.reason == "abort"


def test_rows_are_as_long_as_said(runner: ModelRunner) -> None:
    desk = Desk(runner)
    _, events = desk.ask([4] * (LENGTH - 3), Sampling(3, temperature=0, ignore_eos=True), 1)
    desk.finish()
    assert len(tokens_of(events)) == 3


@settings(max_examples=20, deadline=None)
@given(
    prompt=st.lists(st.integers(2, 30), min_size=1, max_size=30),
    neighbours=st.lists(st.tuples(PROMPTS, st.integers(0, 4)), max_size=3),
    prefill_tokens=st.integers(1, 40),
    model=st.integers(0, 3),
    count=st.integers(0, 3),
)
def test_a_prompts_own_log_probabilities_are_the_models(
    runner: ModelRunner, prompt: list[int], neighbours: list[Any], prefill_tokens: int,
    model: int, count: int,
) -> None:  # fmt: skip
    """In whatever parts it is read, and also where its beginning is known already."""
    desk = Desk(runner, prefill_tokens=prefill_tokens)
    sampling = Sampling(count, temperature=0, ignore_eos=True, logprobs=2, score_prompt=True)
    with torch.no_grad():
        ids = torch.tensor([prompt])
        expected = peft_model(model)(input_ids=ids).logits[0].log_softmax(-1)
    for _ in range(2):
        for other, another in neighbours:
            desk.ask(other, Sampling(4, temperature=0), another)
        _, events = desk.ask(prompt, sampling, model)
        desk.finish()
        read, *tokens, last = events
        assert isinstance(read, PromptRead) and [token.id for token in read.tokens] == prompt
        assert read.tokens[0] == Token(prompt[0], "")
        for at, token in enumerate(read.tokens[1:]):
            assert token.logprob == pytest.approx(float(expected[at, token.id]), abs=1e-4)
            assert [p for _, p in token.top] == pytest.approx(
                expected[at].topk(2).values.tolist(), abs=1e-4
            )
        assert len(tokens) == count and isinstance(last, Finished)
        assert (last.reason, last.cached_tokens, last.completion_tokens) == ("length", 0, count)
    assert tokens_of(tokens) == reference_without_end(tuple(prompt), model, count)


def reference_without_end(prompt: tuple[int, ...], model: int, count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, peft_model(model)(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


def test_where_there_is_no_memory_for_a_rank_its_requests_fail_alone(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk, own = Desk(runner), SlotGroup

    def group(sites: Any, rank: int, *more: Any) -> Any:
        if rank == 64:
            raise RuntimeError("out of memory")
        return own(sites, rank, *more)

    monkeypatch.setattr(serving_slots, "SlotGroup", group)
    monkeypatch.setattr(runner.slots, "groups", {})
    told = [desk.ask([3, 4], Sampling(4, temperature=0), model)[1] for model in (1, 2, 1, 0)]
    desk.batcher.warmed(model_of(5))  # of rank 64, too
    desk.finish()
    kinds = [type(events[-1]).__name__ for events in told]
    assert kinds == ["Failed", "Finished", "Failed", "Finished"]
    assert "no memory for 4 slots of rank 64" in str(told[0][-1])
    assert not any(desk.cache.held.values()) and not desk.batcher.running
    assert "no memory" in caplog.text
    monkeypatch.undo()
    _, events = desk.ask([3, 4], Sampling(4, temperature=0, ignore_eos=True), 1)
    desk.finish()
    assert len(tokens_of(events)) == 4


def test_how_long_a_request_waited_is_told(runner: ModelRunner) -> None:
    desk = Desk(runner, slots=1)
    _, first = desk.ask([2, 3], Sampling(5, temperature=0, ignore_eos=True), 4)
    _, second = desk.ask([2, 3], Sampling(5, temperature=0, ignore_eos=True), 8)
    began = time.monotonic()
    while not isinstance(first[-1:] and first[-1], Finished):
        desk.batcher.step()
    between = time.monotonic() - began
    desk.finish()
    early, late = first[-1], second[-1]
    assert isinstance(early, Finished) and isinstance(late, Finished)
    assert early.queued is not None and late.queued is not None
    assert early.queued < between <= late.queued


def test_scored_prompts_bound_the_logits_that_are_held(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is as wide as the vocabulary; those who are not scored are read as before."""
    desk, rows, own = Desk(runner, prefill_tokens=600), list[int](), runner.run

    def run(*works: Any) -> Any:
        answer = own(*works)
        rows.append(len(answer[1]))
        return answer

    monkeypatch.setattr(runner, "run", run)
    scored = Sampling(2, temperature=0, ignore_eos=True, logprobs=0, score_prompt=True)
    told = [desk.ask([5] * 90, scored, tenant=f"{n}")[1] for n in range(4)]
    _, quick = desk.ask([5] * 90, Sampling(2, temperature=0, ignore_eos=True))
    desk.batcher.step()
    assert len(tokens_of(quick)) == 1
    desk.finish()
    assert max(rows) <= 128 + 6 and len(rows) >= 4
    first, *others = ([t.logprob for t in events[0].tokens[1:]] for events in told)  # type: ignore[union-attr]
    assert len(first) == 89 and all(one == pytest.approx(first, abs=1e-4) for one in others)
