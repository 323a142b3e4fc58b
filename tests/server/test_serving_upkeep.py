"""What is told of a server: its models, its health, its metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loopback_server import Server
from scripted_serving import NEWS, scripted_front, served

from meadow.server.serving.catalogue import Health


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(scripted_front()) as server:
        yield server


def test_models_name_versions_and_no_path(server: Server) -> None:
    told = server.ask("/v1/models").json
    assert told["object"] == "list"
    base, news = told["data"]
    assert (base["id"], base["parent"], base["version"]) == ("tiny", None, None)
    assert (news["id"], news["root"], news["parent"]) == ("news", "news@v7", "tiny")
    assert (news["version"], news["digest"], news["created"]) == ("v7", NEWS.digest, 1_800_000_000)
    assert not any("/" in str(value) for card in told["data"] for value in card.values())


def test_a_model_can_be_asked_for_by_any_name(server: Server) -> None:
    assert server.ask("/v1/models/news").json["root"] == "news@v7"
    found = server.ask("/v1/models/news%40v7").json
    assert (found["id"], found["root"], found["parent"]) == ("news@v7", "news@v7", "tiny")
    reply = server.ask("/v1/models/..%2F..%2Fetc%2Fpasswd")
    assert reply.status == 404 and reply.error["param"] == "model"


def test_health_is_empty_while_all_is_well() -> None:
    with served(scripted_front()) as server:
        reply = server.ask("/health")
        assert (reply.status, reply.body) == (200, b"")
        server.catalogue.state = Health("/srv/registry is gone", ("news@prod",), 3)
        reply = server.ask("/health")
        assert reply.status == 200 and "/srv" not in reply.body.decode()
        assert reply.json == {"registry": "cannot be read", "aliases_behind": 1}
        text = server.ask("/metrics").body.decode()
        assert "meadow:registry_up 0\n" in text and "meadow:aliases_behind 1\n" in text
        assert "meadow:versions_refused_total 3\n" in text
        assert server.ask("/admin/status").json["catalogue"]["registry"] == "/srv/registry is gone"


def test_a_server_whose_engine_broke_down_is_not_well() -> None:
    with served(scripted_front()) as server:
        server.engine.fault = "out of memory at /srv/x"
        reply = server.ask("/health")
        assert reply.status == 503 and "/srv" not in reply.error["message"]


def test_metrics_have_vllms_names_and_prometheus_form() -> None:
    with served(scripted_front()) as server:
        server.ask("/v1/completions", {"model": "news", "prompt": "a", "max_tokens": 4})
        server.ask("/v1/completions", {"model": "other", "prompt": "a"})
        reply = server.ask("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    values, kinds = parsed(reply.body.decode())
    model = '{model_name="tiny"}'
    assert values[f"vllm:num_requests_running{model}"] == 3
    assert values[f"vllm:num_requests_waiting{model}"] == 1
    assert values[f"vllm:kv_cache_usage_perc{model}"] == 0.25
    assert values[f"vllm:prompt_tokens_total{model}"] == 110
    assert values[f"vllm:generation_tokens_total{model}"] == 220
    assert values['vllm:request_success_total{model_name="tiny",finished_reason="length"}'] == 1
    assert values[f"vllm:time_to_first_token_seconds_count{model}"] == 1
    assert values[f"vllm:inter_token_latency_seconds_count{model}"] == 3
    assert values[f"vllm:e2e_request_latency_seconds_count{model}"] == 1
    assert values[f"vllm:request_queue_time_seconds_count{model}"] == 1
    assert values[f"vllm:request_queue_time_seconds_sum{model}"] == 0.25
    assert kinds["vllm:request_queue_time_seconds"] == "histogram"
    assert values['meadow:http_answers_total{status="404"}'] == 1
    loads = [name for name in values if name.startswith("vllm:lora_requests_info")]
    assert loads == [
        'vllm:lora_requests_info{max_lora="16",running_lora_adapters="news@v7,odd\\"\\\\",'
        'waiting_lora_adapters="news@v7"}'
    ]
    assert kinds["vllm:e2e_request_latency_seconds"] == "histogram"


def parsed(text: str) -> tuple[dict[str, float], dict[str, str]]:
    """Values by series, kinds by name; every series has to have a kind, buckets have to rise."""
    values, kinds = dict[str, float](), dict[str, str]()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            assert name in kinds or name.rpartition("_")[0] in kinds, name
            assert series not in values
            values[series] = float(value)
    for histogram in (name for name, kind in kinds.items() if kind == "histogram"):
        of_it = {s: v for s, v in values.items() if s.startswith(histogram)}
        buckets = [v for s, v in of_it.items() if s.startswith(f"{histogram}_bucket")]
        (total,) = (v for s, v in of_it.items() if s.startswith(f"{histogram}_count"))
        assert buckets == sorted(buckets) and buckets[-1] == total
    return values, kinds
