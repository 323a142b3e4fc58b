"""What a coordinator has to know of a base model, without its weights in memory.

Names and shapes follow from the config; the digest is streamed from the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, ModelConfig
from ..errors import ConfigError
from ..nano import FOLDER as NANO_FOLDER
from ..store import Disk
from .adapter_writer import save_adapter
from .base_model import NANO, load_skeleton, sites
from .layout import Site, Tree
from .peft_format import SERVABLE_RANKS, largest_rank


@dataclass(frozen=True)
class Blueprint:
    """A base's name and digest, its adapted layers, and the names of all its modules."""

    name: str
    digest: str
    layers: tuple[Site, ...]
    modules: tuple[str, ...]

    def export(self, config: Config, tree: Tree, folder: Path, run_id: str, disk: Disk) -> None:
        """Write a LoRA adapter in PEFT's format."""
        save_adapter(
            folder,
            tree,
            scaling=config.scaling,
            base=str(NANO_FOLDER) if self.name == NANO else self.name,
            modules=self.modules,
            metadata={"base_digest": self.digest, "run": run_id},
            disk=disk,
        )


def open_blueprint(model: ModelConfig) -> Blueprint:
    """The blueprint of the base that a config names.  Raises ModelError."""
    skeleton, digest = load_skeleton(model.base)
    modules = tuple(name for name, _ in skeleton.named_modules())
    return Blueprint(model.base, digest, tuple(sites(skeleton, model.targets)), modules)


def check_shape(rank: int, layers: Sequence[Site], integers: bool) -> None:
    """Refuse, before the work, a rank that a layer cannot have, or whose adapter could not be
    written; the signs of a pool (`integers`) may have more columns than a matrix has."""
    if not integers:
        check_rank(rank, layers)
    check_exportable(rank, layers)


def check_rank(rank: int, layers: Sequence[Site]) -> None:
    """Refuse a rank that some adapted layer cannot have."""
    for site in layers:
        if rank > min(site.rows, site.columns):
            raise ConfigError(
                f"[model] rank = {rank} is more than layer {site.name} has"
                f" ({site.rows} x {site.columns})",
                f"at most {min(min(s.rows, s.columns) for s in layers)}",
            )


def check_exportable(rank: int, layers: Sequence[Site]) -> None:
    """Refuse a rank whose adapter could not be written after the work."""
    if rank > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"[model] rank = {rank} cannot be exported", f"at most {SERVABLE_RANKS[-1]}"
        )
    largest = largest_rank((site.rows, site.columns) for site in layers)
    if rank > largest:
        raise ConfigError(
            f"[model] rank = {rank} is larger than every adapted layer", f"at most {largest}"
        )
