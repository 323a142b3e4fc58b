"""A server takes no adapter of a larger rank than it was told: slots take memory by rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogues import add
from registries import BLUEPRINT

from meadow.cli import main
from meadow.errors import AdapterError
from meadow.peft_adapters.peft_format import LARGEST_RANK
from meadow.server.registry import Registry
from meadow.server.serving.catalogue import Catalogue

pytest_plugins = ("registry_fixtures",)


def test_a_larger_rank_does_not_verify_and_the_line_says_which(registry: Registry) -> None:
    version = add(registry, 1)  # of rank 8
    with Catalogue("base", BLUEPRINT, registry, largest_rank=7) as catalogue:
        for model in ("a", "a@v1"):
            with pytest.raises(AdapterError, match="a@v1 has rank 8, and at most 7 is served"):
                catalogue.acquire(model)
        assert catalogue.health().refused
        assert version.id not in registry._leases.held()  # it may be deleted
    with (
        Catalogue("base", BLUEPRINT, registry, largest_rank=8) as catalogue,
        catalogue.acquire("a") as lease,
    ):
        assert str(lease.model) == "a@v1" and version.id in registry._leases.held()


def test_a_bound_that_no_adapter_may_reach_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before the base is loaded."""
    nowhere = ("--base", str(tmp_path / "no"), "--listen", "127.0.0.1:0")
    assert main(["serve", "--max-rank", "1024", *nowhere]) == 2
    assert f"--max-rank 1024 is not 1 to {LARGEST_RANK}" in capsys.readouterr().err
    assert main(["serve", "--max-rank", str(LARGEST_RANK), *nowhere]) == 2
    assert "no such folder" in capsys.readouterr().err
