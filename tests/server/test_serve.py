"""The whole server in one process: a real engine over a small base, and a registry that changes."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_server import PATIENCE, Server, running
from openai import OpenAI
from peft import PeftModel
from served_registry import LENGTH, ServedRegistry
from transformers import AutoModelForCausalLM

from meadow.errors import StorageError
from meadow.server.registry_leases import Leases
from meadow.server.serving.engine import EngineOptions
from meadow.server.serving.serve import ServeOptions, opened_front
from meadow.server.serving.tenants import Tenants

PROMPT = "say abc"
IDS = [0, 20, 2, 26, 28, 2, 3, 4]


@contextmanager
def serving(shelf: ServedRegistry) -> Iterator[Server]:
    options = ServeOptions(
        base=str(shelf.base), registry=shelf.folder, device="cpu",
        engine=EngineOptions(max_rows=4, kv_tokens=2 * LENGTH),
    )  # fmt: skip
    with opened_front(options, Tenants()) as front, running(front) as server:
        yield server


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[ServedRegistry]:
    with ServedRegistry(tmp_path) as shelf:
        yield shelf


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServedRegistry, Server]]:
    """Two versions of `news`, of which `canary` is the second; one server for several tests."""
    with ExitStack() as resources:
        shelf = resources.enter_context(ServedRegistry(tmp_path_factory.mktemp("stage")))
        shelf.publish(1)
        shelf.publish(2, "canary")
        yield shelf, resources.enter_context(serving(shelf))


def ask(server: Server, model: str = "news", **more: Any) -> Any:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **more}
    body["return_token_ids"] = True
    reply = server.ask("/v1/completions", body)
    assert reply.status == 200, reply.body
    return reply.json


def ids(server: Server, model: str, **more: Any) -> list[int]:
    found: list[int] = ask(server, model, ignore_eos=True, **more)["choices"][0]["token_ids"]
    return found


def version(server: Server, model: str = "news") -> str:
    return str(ask(server, model, max_tokens=1)["model"])


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shown(server: Server, model: str) -> Any:
    return server.ask(f"/v1/models/{model}").json["version"]


@contextmanager
def held(engine: Any) -> Iterator[None]:
    """The engine takes no step until the block ends."""
    step, go_on = engine._batcher.step, threading.Event()

    def wait_and_step() -> Any:
        assert go_on.wait(PATIENCE)
        return step()

    engine._batcher.step = wait_and_step
    try:
        yield
    finally:
        go_on.set()
        engine._batcher.step = step


def reference(shelf: ServedRegistry, named: str, tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their log probabilities by plain transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(shelf.base)
    if named != "base":
        folder = shelf.files(shelf.registry.resolve(named))
        model = PeftModel.from_pretrained(model, folder)
    sequence = list(IDS)
    rows = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0, -1].float()
        rows.append(logits.log_softmax(-1))
        sequence.append(int(logits.argmax()))
    return sequence[len(IDS) :], torch.stack(rows)


# --- answers -----------------------------------------------------------------------------------


def test_tokens_and_probabilities_are_those_of_peft(
    stage: tuple[ServedRegistry, Server],
) -> None:
    shelf, server = stage
    said = {}
    for model, named in (("base", "base"), ("news", "news@v1"), ("news@canary", "news@v2")):
        tokens, rows = reference(shelf, named, 12)
        told = ask(server, model, logprobs=3, ignore_eos=True)
        (choice,) = told["choices"]
        assert choice["token_ids"] == tokens and choice["prompt_token_ids"] == IDS
        assert told["model"] == named
        best = rows.topk(3).values
        found = choice["logprobs"]
        assert torch.allclose(torch.tensor(found["token_logprobs"]), best[:, 0], atol=1e-3)
        for top, expected in zip(found["top_logprobs"], best, strict=True):
            assert torch.allclose(torch.tensor(sorted(top.values())), expected.flip(0), atol=1e-3)
        said[named] = tokens
    assert len({str(tokens) for tokens in said.values()}) == 3, "the adapters change nothing"


def test_every_way_to_name_a_version_gives_that_version(
    stage: tuple[ServedRegistry, Server],
) -> None:
    shelf, server = stage
    digest = shelf.registry.resolve("news@v1").id
    for name in ("news", "news@prod", "news@v1", f"news@sha256:{digest[:12]}"):
        told = ask(server, name, max_tokens=1)
        assert (told["model"], told["system_fingerprint"]) == ("news@v1", digest[:12])
    told = server.ask("/v1/models").json["data"]
    assert sorted(card["id"] for card in told) == ["base", "news", "news@canary"]
    assert str(shelf.root) not in str(told)


@pytest.mark.parametrize(
    "name", ["../base", "/etc", "news@v9", "news@x", "news@sha256:00", "other", "news@v1/..", "@"]
)
def test_what_is_not_there_is_404(stage: tuple[ServedRegistry, Server], name: str) -> None:
    reply = stage[1].ask("/v1/completions", {"model": name, "prompt": "a"})
    assert reply.status == 404 and reply.error["param"] == "model"


def test_the_official_client(stage: tuple[ServedRegistry, Server]) -> None:
    shelf, server = stage
    with OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        whole = client.completions.create(
            model="news", prompt=PROMPT, temperature=0, max_tokens=9,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = client.completions.create(
            model="news", prompt=PROMPT, temperature=0, max_tokens=9, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        *parts, last = list(chunks)
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert last.usage is not None and whole.usage is not None
        assert last.usage.completion_tokens == whole.usage.completion_tokens == 9
        chat = client.chat.completions.create(
            model="news@canary", messages=[{"role": "user", "content": "hi"}], n=3, seed=7,
            max_tokens=5, logprobs=True, top_logprobs=2, temperature=1.5,
        )  # fmt: skip
        again = client.chat.completions.create(
            model="news@canary", messages=[{"role": "user", "content": "hi"}], n=3, seed=7,
            max_tokens=5, logprobs=True, top_logprobs=2, temperature=1.5,
        )  # fmt: skip
        assert [c.message.content for c in chat.choices] == [
            c.message.content for c in again.choices
        ]
        assert len({str(choice.message.content) for choice in chat.choices}) > 1
        assert chat.choices[0].logprobs is not None


def test_a_prompts_tokens_have_the_probabilities_with_which_they_were_drawn(
    stage: tuple[ServedRegistry, Server],
) -> None:
    """By the official client, as evaluation harnesses ask: an answer scored as a prompt."""
    _, server = stage
    with OpenAI(base_url=server.url, api_key="none", timeout=PATIENCE) as client:
        asked: dict[str, Any] = {"model": "news", "logprobs": 1}
        extra = {"ignore_eos": True, "return_token_ids": True}
        said = client.completions.create(
            **asked, prompt=[IDS], max_tokens=12, temperature=1.0, seed=3, extra_body=extra
        ).choices[0]
        drawn = said.to_dict()["token_ids"]
        assert isinstance(drawn, list) and said.logprobs is not None
        scored = client.completions.create(
            **asked, prompt=[[*IDS, *drawn]], max_tokens=0, echo=True
        )
        found = scored.choices[0].logprobs
        assert found is not None and found.token_logprobs is not None
        assert said.logprobs.token_logprobs is not None
        assert found.token_logprobs[0] is None and len(found.token_logprobs) == len(IDS) + 12
        assert found.token_logprobs[len(IDS) :] == pytest.approx(
            said.logprobs.token_logprobs, abs=1e-4
        )
        assert found.tokens is not None and found.tokens[len(IDS) :] == said.logprobs.tokens
        assert scored.usage is not None and scored.usage.completion_tokens == 0


def test_stop_strings_and_lengths(stage: tuple[ServedRegistry, Server]) -> None:
    _, server = stage
    whole = ask(server, "base", max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    stop = whole[6:9]
    told = ask(server, "base", max_tokens=20, ignore_eos=True, stop=[stop])["choices"][0]
    assert told["finish_reason"] == "stop" and told["text"] == whole[: whole.index(stop)]
    body = {"model": "base", "prompt": "a", "max_tokens": LENGTH}
    reply = server.ask("/v1/completions", body)
    assert reply.status == 400 and str(LENGTH) in reply.error["message"]


def test_metrics_of_a_real_engine(stage: tuple[ServedRegistry, Server]) -> None:
    _, server = stage
    ask(server)
    text = server.ask("/metrics").body.decode()
    assert 'vllm:generation_tokens_total{model_name="base"}' in text
    assert "meadow:registry_up 1\n" in text
    assert server.ask("/admin/status").json["engine"]["running"] == 0


def test_a_client_that_hangs_up_frees_its_row(stage: tuple[ServedRegistry, Server]) -> None:
    _, server = stage
    with OpenAI(base_url=server.url, api_key="none", timeout=PATIENCE) as client:
        more = {"ignore_eos": True}
        with client.completions.create(
            model="news", prompt="a", max_tokens=LENGTH - 9, stream=True, extra_body=more
        ) as stream:
            next(iter(stream))
            eventually(lambda: server.engine.stats().running == 1)
    eventually(lambda: server.engine.stats().running == 0)
    eventually(lambda: server.front.meters.finished["abort"] == 1)


def test_an_engine_that_breaks_down_says_so(shelf: ServedRegistry) -> None:
    """Who waits is told, and so is who watches; nothing hangs."""
    with serving(shelf) as server:
        server.engine._batcher.step = lambda: 1 / 0
        reply = server.ask("/v1/completions", {"model": "base", "prompt": "a"})
        assert reply.status == 500 and "zero" not in reply.error["message"]
        assert server.ask("/health").status == 503
        assert server.ask("/v1/completions", {"model": "base", "prompt": "a"}).status == 503


# --- a registry that changes -------------------------------------------------------------------


def test_a_new_version_is_served_and_one_can_go_back(shelf: ServedRegistry) -> None:
    """What is under way finishes on the version it began with."""
    shelf.publish(1)
    with serving(shelf) as server:
        assert version(server) == "news@v1"
        with OpenAI(base_url=server.url, api_key="none", timeout=PATIENCE) as client:
            stream = iter(
                client.completions.create(
                    model="news", prompt=PROMPT, temperature=0, max_tokens=300, stream=True,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                )
            )  # fmt: skip
            chunks = [next(stream) for _ in range(3)]
            with held(server.engine):
                assert server.engine.stats().running == 1
                shelf.publish(2)
                eventually(lambda: shown(server, "news") == "v2")
            chunks += stream
        assert {chunk.model for chunk in chunks} == {"news@v1"}
        streamed = [id for chunk in chunks for id in chunk.choices[0].to_dict()["token_ids"]]  # type: ignore[attr-defined]
        assert streamed == ids(server, "news@v1", max_tokens=300)
        assert ids(server, "news") == ids(server, "news@v2") != ids(server, "news@v1")
        shelf.registry.rollback("news")
        eventually(lambda: version(server) == "news@v1")
        assert ids(server, "news") == streamed[:12]


def test_a_damaged_version_stays_out_and_the_one_before_answers(
    shelf: ServedRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.publish(1)
    second = shelf.publish(2)
    shelf.corrupt(second)
    with serving(shelf) as server, caplog.at_level(logging.WARNING):
        assert version(server) == "news@v1"
        assert server.ask("/health").json == {"registry": "ok", "aliases_behind": 1}
        text = server.ask("/metrics").body.decode()
        assert "meadow:aliases_behind 1\n" in text and "meadow:versions_refused_total 1\n" in text
        assert "news@v2" in caplog.text
        reply = server.ask("/v1/completions", {"model": "news@v2", "prompt": "a"})
        assert reply.status == 503 and str(shelf.root) not in reply.error["message"]
        assert server.ask("/v1/models/news@v2").status == 503
        shelf.publish(2)  # the same content again mends it
        eventually(lambda: version(server) == "news@v2")
        assert server.ask("/health").body == b""


def test_a_version_that_is_damaged_while_it_is_served_goes_on_being_served(
    shelf: ServedRegistry,
) -> None:
    """Its weights are in memory; from the disk it would not come back."""
    first = shelf.publish(1)
    with serving(shelf) as server:
        before = ids(server, "news")
        shelf.corrupt(first)
        assert ids(server, "news") == before


def test_an_adapter_for_another_base_is_never_served(shelf: ServedRegistry) -> None:
    shelf.publish(1)
    shelf.publish(5, name="alien", base_digest="cd" * 32)
    with serving(shelf) as server:
        assert version(server) == "news@v1"
        for name in ("alien", "alien@v1"):
            reply = server.ask("/v1/completions", {"model": name, "prompt": "a"})
            assert reply.status == 503 and reply.error["param"] == "model"
        shelf.publish(6, base_digest="cd" * 32)
        eventually(lambda: server.ask("/health").body != b"")
        assert version(server) == "news@v1"


def test_a_registry_that_goes_away_and_comes_back(shelf: ServedRegistry) -> None:
    shelf.publish(1)
    shelf.publish(2, "canary")
    away = shelf.folder.with_name("away")
    with serving(shelf) as server:
        before = ids(server, "news")
        shelf.folder.rename(away)
        eventually(lambda: server.ask("/health").body != b"")
        assert server.ask("/health").json["registry"] == "cannot be read"
        assert server.ask("/health").status == 200
        assert ids(server, "news") == before
        assert ids(server, "base")
        assert server.ask("/v1/completions", {"model": "x", "prompt": "a"}).status in (404, 503)
        away.rename(shelf.folder)
        eventually(lambda: server.ask("/health").body == b"")
        assert version(server, "news@canary") == "news@v2"
        shelf.publish(3)
        eventually(lambda: version(server) == "news@v3")


def test_a_full_disk_keeps_only_what_is_new_from_being_served(
    shelf: ServedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a version, the registry notes on disk that it is in use."""
    shelf.publish(1)
    shelf.publish(2, "canary")

    def full(*what: object) -> None:
        raise StorageError("cannot write /srv/registry: the disk is full")

    with serving(shelf) as server:
        before = ids(server, "news")
        with monkeypatch.context() as patch:
            patch.setattr(Leases, "take", full)
            reply = server.ask("/v1/completions", {"model": "news@canary", "prompt": "a"})
            assert reply.status == 503 and "/srv" not in reply.error["message"]
            assert ids(server, "news") == before
        assert version(server, "news@canary") == "news@v2"


@pytest.mark.long
def test_a_thousand_flips_under_load(shelf: ServedRegistry) -> None:
    """No request fails, and every answer is one version's, token by token."""
    shelf.publish(1)
    shelf.publish(2, "")
    with serving(shelf) as server:
        expected = {f"news@v{number}": ids(server, f"news@v{number}") for number in (1, 2)}
        assert expected["news@v1"] != expected["news@v2"]
        seen, faults, done = Counter[str](), list[BaseException](), threading.Event()

        def call() -> None:
            try:
                while not done.is_set():
                    told = ask(server, ignore_eos=True)
                    assert told["choices"][0]["token_ids"] == expected[told["model"]]
                    seen[told["model"]] += 1
            except BaseException as error:
                faults.append(error)

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for flip in range(1000):
            if flip % 2:
                shelf.registry.rollback("news")
            else:
                shelf.registry.promote("news@v2")
        done.set()
        for caller in callers:
            caller.join(PATIENCE)
        assert not faults, faults
        assert min(seen[name] for name in expected) > 0
        eventually(lambda: version(server) == "news@v1")
        assert server.ask("/health").body == b""
