"""Artificial partitions: which row goes to which simulated client.

Rows are first put in an order that depends on the seed alone, then cut by `flwr_datasets`:

    iid         equal shares
    dirichlet   the rows of each label are shared out by Dirichlet(alpha)  (Yurochkin et al.,
                "Bayesian Nonparametric Federated Learning", arXiv:1905.12022)
    quantity    client sizes are drawn from Dirichlet(alpha), the rows are IID  (Li et al.,
                "Federated Learning on Non-IID Data Silos", arXiv:2102.02079)
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, DataError

NATURAL = "natural"
PARTITIONS = (NATURAL, "iid", "dirichlet", "quantity")
_LEAST = 2  # rows of a client: one to train on, one to hold out


def share_out(
    labels: Sequence[str], kind: str, clients: int, alpha: float, seed: int
) -> list[list[int]]:
    """Row numbers of each client, ascending; every row is in exactly one place.

    `labels` has one entry per row; every client gets at least two rows.  Raises ConfigError on
    impossible settings and DataError where the rows can't be shared out so.
    """
    if kind not in PARTITIONS[1:]:
        raise ConfigError(f"unknown partition {kind!r}", f"known: {', '.join(PARTITIONS)}")
    if clients < 1 or not 0 < alpha < float("inf"):
        raise ConfigError(f"partition {kind!r} needs participants >= 1 and alpha > 0")
    if len(labels) < _LEAST * clients:
        raise DataError(f"{len(labels)} rows are too few for {clients} clients of {_LEAST} or more")
    number = _number(seed)
    generator = random.Random(number)
    order = sorted(range(len(labels)), key=lambda _: generator.random())
    partitioner = _partitioner(kind, clients, alpha, number, len(labels))
    return _shares(partitioner, [labels[row] for row in order], order, clients, alpha)


def _number(seed: int) -> int:
    digest = hashlib.sha256(f"meadow/partition/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _partitioner(kind: str, clients: int, alpha: float, seed: int, rows: int) -> Any:
    # Imported here: it takes seconds, and natural partitions do without.
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, SizePartitioner

    if kind == "iid":
        return IidPartitioner(clients)
    if kind == "quantity":
        return SizePartitioner(_sizes(rows, clients, alpha, seed))
    return DirichletPartitioner(clients, "label", alpha, min_partition_size=_LEAST, seed=seed)


def _sizes(rows: int, clients: int, alpha: float, seed: int) -> list[int]:
    """Client sizes that sum to `rows`: the least each, the rest by Dirichlet(alpha)."""
    import numpy as np

    free = rows - _LEAST * clients
    edges = np.cumsum(np.random.default_rng(seed).dirichlet([alpha] * clients)) * free
    cuts = [0, *(round(edge) for edge in edges[:-1].tolist()), free]
    return [_LEAST + high - low for low, high in zip(cuts, cuts[1:], strict=False)]


def _shares(
    partitioner: Any, labels: Sequence[str], rows: Sequence[int], clients: int, alpha: float
) -> list[list[int]]:
    from datasets import Dataset

    codes = {label: code for code, label in enumerate(sorted(set(labels)))}
    partitioner.dataset = Dataset.from_dict(
        {"label": [codes[label] for label in labels], "row": list(rows)}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one for each draw that is repeated
            return [sorted(partitioner.load_partition(k)["row"]) for k in range(clients)]
    except ValueError:
        message = f"alpha = {alpha} leaves one of {clients} clients with fewer than {_LEAST} rows"
        raise DataError(message, "raise alpha, or take fewer clients or another seed") from None
