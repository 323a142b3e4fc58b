"""The table of algorithms, from the code: for `meadow strategies`, the README and the docs.

Bytes are measured, not written down: a strategy packs its real messages at nano's shape.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..client.message_sizes import measured_bytes
from ..nano import FOLDER
from ..peft_adapters.layout import Site
from ..strategies.base import Strategy
from ..strategies.registry import STRATEGIES, make

RANK, CLIENTS, STEPS = 8, 8, 200
_ROUNDS = 4  # after so many the side adapters have reached their width

Row = dict[str, Any]


def rows() -> list[Row]:
    """One row a strategy.  Bytes are of one client's message in one round: the most, and under
    `least_…` the least, over the rounds."""
    return [dict(_row(kind)) for kind in STRATEGIES.values()]


@cache
def _row(kind: type[Strategy]) -> Row:
    rank = kind.customary_rank or RANK
    strategy = make(kind.name, {}, nano_sites(), rank)
    up, down = measured_bytes(strategy, CLIENTS, _ROUNDS, STEPS)
    return {
        "name": kind.name,
        "rank": rank,
        "file": Path(inspect.getfile(kind)).name,
        "summary": kind.summary,
        "paper": kind.paper,
        "lines": lines_of_code(inspect.getsource(sys.modules[kind.__module__])),
        "bytes_up": max(up),
        "bytes_down": max(down),
        "least_bytes_up": min(up),
        "least_bytes_down": min(down),
        "mixed_ranks": kind.mixed_ranks,
        "quantized_base": True,  # all: base weights are never written
        "secure_sum": kind.secure_sum,
        "dp": kind.dp,
        "personal": kind.personal,
    }


_HEADS = (
    "strategy", "lines", "paper", "what it does", "rank", "KB up", "KB down", "mixed ranks",
    "quantised base", "secure sum", "DP", "personal",
)  # fmt: skip


def markdown(found: Sequence[Row], folder: str = "strategies/") -> str:
    """The table as Markdown; `folder` leads from the page to the strategies' files."""
    heads = " | ".join(_HEADS)
    lines = [f"| {heads} |", "|---" * len(_HEADS) + "|"]
    lines += [f"| {' | '.join(_cells(row, folder))} |" for row in found]
    return "\n".join(lines) + "\n"


def _cells(row: Row, folder: str) -> list[str]:
    flags = {key: "yes" if value else "no" for key, value in row.items()}
    arxiv = row["paper"].removeprefix("arXiv ")
    return [
        f"[`{row['name']}`]({folder}{row['file']})", str(row["lines"]),
        f"[{row['paper']}](https://arxiv.org/abs/{arxiv})", row["summary"], str(row["rank"]),
        _kilobytes(row, "bytes_up"), _kilobytes(row, "bytes_down"), flags["mixed_ranks"],
        flags["quantized_base"], flags["secure_sum"], row["dp"], flags["personal"],
    ]  # fmt: skip


def _kilobytes(row: Row, key: str) -> str:
    least, most = (_short(row[name] / 1000) for name in (f"least_{key}", key))
    return least if least == most else f"{least}–{most}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def lines_of_code(source: str) -> int:
    """Lines that hold code: neither blank nor of a comment or docstring."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in prose
        for number, line in enumerate(source.splitlines(), start=1)
    )


# --- shapes -------------------------------------------------------------------------------------


def nano_sites(folder: Path = FOLDER) -> tuple[Site, ...]:
    """The linear layers of nano, or of another llama, from its config alone."""
    return sites_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def sites_of(shape: Mapping[str, Any]) -> tuple[Site, ...]:
    """The linear layers of a llama of this config, as (name, out, in), sorted by name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layers = {
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    names = {
        f"model.layers.{number}.{name}": sizes
        for number in range(shape["num_hidden_layers"])
        for name, sizes in layers.items()
    }
    return tuple(Site(name, *names[name]) for name in sorted(names))
