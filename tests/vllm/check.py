"""What tests/vllm/run.sh checks on real servers: versions, swaps, repairs and closed doors.

check.py prepare --folder DIR                           a base of 27 million random weights
check.py check --folder DIR --url A ... --group FILE    against servers of it

VLLM_API_KEY is the servers' key.  The first is killed: FILE has the number of its process group,
and whoever started it has to start it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meadow.config import ModelConfig
from meadow.identity import own_identity
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.blueprint import Blueprint, open_blueprint
from meadow.peft_adapters.manifest import Provenance, write_manifest
from meadow.server.registry import Registry
from meadow.server.registry_rows import Version
from meadow.server.registry_runs import publish_run

LLAMA = {
    "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
TOKENS = 60


def prepare(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "base")
    words = {name: number for number, name in enumerate(["<s>", "</s>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(words, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "base")


def publish(registry: Registry, base: Blueprint, folder: Path, number: int) -> Version:
    """A version with random factors of its own."""
    generator = torch.Generator().manual_seed(number)
    tree = {
        f"{site.name}.{factor}": 0.2 * torch.randn(site.shape(factor, 8), generator=generator)
        for site in base.layers
        for factor in ("lora_A", "lora_B")
    }
    save_adapter(folder / "adapter", tree, scaling=2.0, base=base.name)
    stated = Provenance(
        run_id=f"{number:032x}", base_digest=base.digest, config_digest="0" * 64,
        strategy="random", rounds=1, participants=1, seed=number,
    )  # fmt: skip
    write_manifest(folder, own_identity(), stated)
    return publish_run(registry, folder, "mail", alias="prod")


class Client:
    """Asks in greedy decoding; answers are token ids, or text where a server gives none."""

    def __init__(
        self, session: aiohttp.ClientSession, gateway: str, servers: Sequence[str]
    ) -> None:
        self.session, self.gateway, self.servers = session, gateway, servers
        self.key = {"Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"}

    async def ask(self, url: str, model: str, **more: Any) -> tuple[int, Any]:
        asked = {"model": model, "prompt": "once", "max_tokens": TOKENS, "temperature": 0.0}
        asked |= {"ignore_eos": True, "return_token_ids": True, **more}
        headers = {} if url == self.gateway else self.key
        async with self.session.post(f"{url}/v1/completions", json=asked, headers=headers) as got:
            return got.status, await got.json(content_type=None)

    async def said(self, url: str, model: str) -> Any:
        status, answer = await self.ask(url, model)
        assert status == 200, answer
        return said_in(answer["choices"][0])

    async def streamed(self, begun: asyncio.Event) -> list[Any]:
        asked = {"model": "mail", "prompt": "once", "max_tokens": TOKENS, "temperature": 0.0}
        asked |= {"ignore_eos": True, "return_token_ids": True, "stream": True}
        parts: list[Any] = []
        async with self.session.post(f"{self.gateway}/v1/completions", json=asked) as answer:
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]" and json.loads(data)["choices"]:
                    parts.append(said_in(json.loads(data)["choices"][0]))
                    begun.set()
        return parts

    async def models(self, url: str) -> set[str]:
        async with self.session.get(f"{url}/v1/models", headers=self.key) as answer:
            return {card["id"] for card in (await answer.json())["data"]}


def said_in(choice: dict[str, Any]) -> Any:
    ids = choice.get("token_ids")
    return choice["text"] if ids is None else ids


def joined(parts: list[Any]) -> Any:
    return (
        "".join(parts) if isinstance(parts[0], str) else [token for part in parts for token in part]
    )


async def check(folder: Path, urls: Sequence[str], group: Path) -> None:
    """Raises AssertionError where the publisher or a server does other than it should."""
    for name in ("registry", "shared"):
        shutil.rmtree(folder / name, ignore_errors=True)
    base = open_blueprint(ModelConfig(base=str(folder / "base")))
    with Registry.open(folder / "registry", own_identity()) as registry:
        first = publish(registry, base, folder / "run-1", 1)
        command = ["publish", "--folder", str(folder / "shared"), "--gateway", "127.0.0.1:0"]
        command += ["--registry", str(folder / "registry"), "--drain", "0", "mail"]
        command += [part for url in urls for part in ("--url", url)]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "meadow.cli", *command, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            gateway = await line_with(child.stdout, r"gateway: (\S+)")
            await line_with(child.stdout, rf"(mail is {named(first)})")
            async with aiohttp.ClientSession() as session:
                client = Client(session, gateway, urls)
                await scenes(client, registry, base, folder, first, child.stdout)
                await restarted(client, named(first), group)
        finally:
            child.terminate()
            await child.wait()


async def scenes(
    client: Client,
    registry: Registry,
    base: Blueprint,
    folder: Path,
    first: Version,
    told: asyncio.StreamReader,
) -> None:
    gateway, one = client.gateway, await client.said(client.servers[0], named(first))
    assert (
        one
        == await client.said(client.servers[1], named(first))
        == await client.said(gateway, "mail")
    )
    assert one != await client.said(gateway, "base"), "the adapter changes nothing"
    done("a version answers alike on every server and through its alias")

    begun = asyncio.Event()
    running = asyncio.create_task(client.streamed(begun))
    await begun.wait()
    second = publish(registry, base, folder / "run-2", 2)
    await line_with(told, rf"(mail is {named(second)})")
    assert joined(await running) == one, "a stream changed its version"
    two = await client.said(gateway, "mail")
    assert two != one and two == await client.said(client.servers[1], named(second))
    await line_with(told, rf"({named(first)} is dropped)")
    for url in client.servers:
        assert await client.models(url) == {"base", named(second)}
    done("a stream stays pure while its alias moves; the old version goes")

    body = {"lora_name": named(second)}
    where = f"{client.servers[0]}/v1/unload_lora_adapter"
    async with client.session.post(where, json=body, headers=client.key) as answer:
        assert answer.status == 200
    assert await client.said(gateway, "mail") == two
    while await client.models(client.servers[0]) != {"base", named(second)}:
        await asyncio.sleep(0.2)
    done("what a server lost is loaded again, and nobody notices")

    registry.rollback("mail")
    await line_with(told, rf"(mail is {named(first)})")
    assert await client.said(gateway, "mail") == one, "a stale prefix, or other weights"
    done("a rollback gives the very tokens of before")

    for model in (str(folder / "run-1" / "adapter"), "../run-1/adapter"):
        assert (await client.ask(gateway, model))[0] == 400
    for path in ("/adapters", "/invocations", "/v1/load_lora_adapter", "/metrics"):
        async with client.session.post(gateway + path, json={}) as answer:
            assert answer.status == 404, path
    done("paths and other doors stay closed")


async def restarted(client: Client, name: str, group: Path) -> None:
    """A server is killed, and is empty when it is back; clients of the gateway notice neither."""
    one = await client.said(client.gateway, "mail")
    os.killpg(int(group.read_text()), signal.SIGKILL)
    while (await said_or_none(client, client.servers[0], name)) is not None:
        await asyncio.sleep(0.2)
    for _ in range(5):
        assert await client.said(client.gateway, "mail") == one
    async with asyncio.timeout(600):
        while await said_or_none(client, client.servers[0], name) != one:
            assert await client.said(client.gateway, "mail") == one
            await asyncio.sleep(1)
    done("a server that was killed is given its versions again, and nobody notices")


async def said_or_none(client: Client, url: str, model: str) -> Any:
    """None where nobody listens, or the model is unknown."""
    try:
        status, answer = await client.ask(url, model)
    except aiohttp.ClientError:
        return None
    return said_in(answer["choices"][0]) if status == 200 else None


def named(version: Version) -> str:
    return f"mail@{version.id[:12]}"


async def line_with(stream: asyncio.StreamReader, pattern: str) -> str:
    async with asyncio.timeout(300):
        while line := (await stream.readline()).decode():
            sys.stdout.write(f"  {line}")
            if found := re.search(pattern, line):
                return found[1]
    raise AssertionError(f"the publisher ended without {pattern}")


def done(what: str) -> None:
    sys.stdout.write(f"ok: {what}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "check"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--url", action="append", default=[])
    parser.add_argument("--group", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("MEADOW_HOME", str(given.folder / "home"))
    if given.what == "prepare":
        prepare(given.folder)
    else:
        asyncio.run(check(given.folder, given.url, given.group))
