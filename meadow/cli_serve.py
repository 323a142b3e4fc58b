"""`meadow serve` and `meadow keys …`: a server of the base and of the registry's adapters."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Add = Callable[..., argparse.ArgumentParser]
Number = Callable[[str], int]
_MEGABYTE = 10**6


def add_serve(commands: Any, add: Add, count: Number, positive: Number) -> None:
    """`meadow serve`; `add(commands, name, run, about)` makes a command."""
    serve = add(commands, "serve", _serve, "answer OpenAI's API with the base and its adapters")
    serve.add_argument("--base", default="nano", help="nano, a folder, or a Hugging Face name")
    serve.add_argument(
        "--registry", type=Path, metavar="DIR", help="default: registry/ beside this user's key"
    )
    serve.add_argument(
        "--listen", default="127.0.0.1:8000", metavar="HOST:PORT", help="default: %(default)s"
    )
    serve.add_argument("--keys", type=Path, metavar="FILE", help="who may ask: `meadow keys`")
    serve.add_argument(
        "--open", action="store_true", help="let everybody ask who can reach --listen"
    )
    serve.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    serve.add_argument("--quantize", choices=["none", "4bit", "8bit"], default="none")
    serve.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    serve.add_argument(
        "--cuda-graphs", action="store_true",
        help="record decoding steps and replay them; needs a GPU and Triton",
    )  # fmt: skip
    serve.add_argument("--threads", type=count, default=0, help="torch threads (0: torch's choice)")
    _add_bounds(serve, count, positive)


def _add_bounds(serve: argparse.ArgumentParser, count: Number, positive: Number) -> None:
    """How much is held at once."""
    bounds = serve.add_argument_group("bounds")
    for name, kind, default, about in (
        ("--max-length", count, 0, "tokens of prompt and answer (0: what the base was made for)"),
        ("--max-rows", positive, 16, "requests in one batch"),
        ("--max-waiting", positive, 256, "requests in the queue; more get 429"),
        ("--kv-tokens", count, 0, "tokens whose keys and values are held (0: rows x length)"),
        ("--prefill-tokens", positive, 512, "tokens of prompts in one step"),
        ("--slots", positive, 16, "adapters of each rank that are ready for a batch"),
        ("--max-rank", positive, 512, "rank of an adapter; versions of a larger one are refused"),
        ("--cache-mb", positive, 1024, "adapters in memory beside the slots"),
        ("--largest-body", positive, 4 * 2**20, "bytes of a request; larger ones get 413"),
    ):
        bounds.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{about}; default: {default}"
        )
    bounds.add_argument(
        "--pin", action="append", default=[], metavar="NAME", help="keep this adapter in its slot"
    )
    bounds.add_argument(
        "--drain", type=count, default=60, metavar="SECONDS",
        help="on SIGTERM, wait so long for what is under way; default: %(default)s",
    )  # fmt: skip


def add_keys(commands: Any, add: Add, count: Number) -> None:
    """The sub-commands of `meadow keys`."""
    new = add(commands, "add", _add_key, "make a key and print it, once")
    _file_and_name(new)
    new.add_argument(
        "--scope", action="append", choices=["inference", "admin"],
        help="what it is for (default: inference); give it twice for both",
    )  # fmt: skip
    new.add_argument("--per-minute", type=count, default=0, help="requests (0: any number)")
    new.add_argument("--at-once", type=count, default=0, help="answers (0: any number)")
    _file_and_name(add(commands, "revoke", _revoke_key, "refuse a key from now on"))
    listing = add(commands, "list", _list_keys, "list keys, without their secrets")
    listing.add_argument("file", type=Path, metavar="FILE")


def _file_and_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="what `meadow serve --keys` reads")
    parser.add_argument("name", help="what to call the key")


def _serve(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .display import Display
    from .server.serving.serve import Opened, serve

    settings, found = _settings(options), list[Opened]()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    with ExitStack() as while_loading:
        while_loading.enter_context(Display(console)).enter("loading")

        def opened(now: Opened) -> None:
            while_loading.close()  # a panel would draw over what is said from here on
            found.append(now)
            for line in _greeting(now, options.keys is not None):
                Console(soft_wrap=True, markup=False, highlight=False).print(line)

        finished = serve(settings, opened)
    Console().print("ended" if finished else "ended; some answers were cut short")
    return {"address": found[0].address, "models": list(found[0].models), "finished": finished}


def _settings(options: argparse.Namespace) -> Any:
    from .server.serving.engine import EngineOptions
    from .server.serving.serve import ServeOptions

    engine = EngineOptions(
        max_length=options.max_length,
        max_rows=options.max_rows,
        max_waiting=options.max_waiting,
        kv_tokens=options.kv_tokens,
        prefill_tokens=options.prefill_tokens,
        slots=options.slots,
        cache_bytes=options.cache_mb * _MEGABYTE,
        pinned=tuple(options.pin),
        cuda_graphs=options.cuda_graphs,
    )
    return ServeOptions(
        base=options.base,
        dtype=options.dtype,
        quantize=options.quantize,
        device=options.device,
        registry=options.registry,
        listen=options.listen,
        keys=options.keys,
        open_to_all=options.open,
        drain_seconds=options.drain,
        largest_body=options.largest_body,
        largest_rank=options.max_rank,
        engine=engine,
    )


def _greeting(now: Any, keyed: bool) -> list[str]:
    """What is served, and a call that can be pasted."""
    base, *adapters = now.models
    shown = ", ".join(adapters[:5]) + (f" and {len(adapters) - 5} more" if adapters[5:] else "")
    body = (
        f'{{"model": "{adapters[0] if adapters else base}", "prompt": "import ", "max_tokens": 16}}'
    )
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    return [
        f"serving {base}" + (f" with {shown}" if adapters else "") + f" at http://{now.address}/v1",
        f"curl http://{now.address}/v1/completions{key}"
        f" -H 'Content-Type: application/json' -d {shlex.quote(body)}",
    ]


def _add_key(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.serving.api_keys import add_key

    scopes = options.scope or ["inference"]
    text = add_key(options.file, options.name, scopes, options.per_minute, options.at_once)
    console.print(
        f"the key of {options.name}, shown this once; {options.file} keeps only its digest:",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return {"name": options.name, "scopes": scopes}


def _revoke_key(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.serving.api_keys import revoke_key

    revoke_key(options.file, options.name)
    Console().print(f"{options.name} is revoked", markup=False, highlight=False, soft_wrap=True)
    return {"name": options.name}


def _list_keys(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .server.serving.api_keys import read_keys

    rows: list[dict[str, Any]] = [
        {"id": key.id, "name": key.name, "scopes": list(key.scopes),
         "per_minute": key.per_minute, "at_once": key.at_once}
        for key in read_keys(options.file)
    ]  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "id", "scopes", "a minute", "at once"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        limits = (str(row[key] or "any") for key in ("per_minute", "at_once"))
        table.add_row(row["name"], row["id"], " ".join(row["scopes"]), *limits)
    Console().print(table if rows else "no keys yet; `meadow keys add` makes one")
    return rows
