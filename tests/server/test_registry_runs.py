"""What a real run leaves in its folder is what the registry takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meadow.config import Config
from meadow.errors import PromotionError
from meadow.identity import own_identity
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.server.registry import Registry
from meadow.server.registry_gates import AllOf, LineageGate, LossGate
from meadow.server.registry_runs import publish_run
from meadow.simulation.engine import Lab, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Config, lab: Lab) -> Path:
    folder = tmp_path_factory.mktemp("run")
    simulate(tiny, folder, lab)
    return folder


def test_a_finished_run_is_published_and_promoted(
    tmp_path: Path, run: Path, tiny: Config, lab: Lab
) -> None:
    gate = AllOf((LineageGate(), LossGate(0.1)))
    with Registry.open(tmp_path, own_identity()) as registry:
        for _ in range(2):  # a run that is continued publishes again
            publish_run(
                registry, run, "mail", alias="prod", gate=gate, blueprint=lab.bench.blueprint
            )
        kinds = [entry.kind for entry in registry.history("mail")]
        assert kinds == ["published", "moved"]
        with registry.lease("mail", lab.bench.blueprint) as opened:
            stated = opened.verified.provenance
            assert (stated.rounds, stated.strategy) == (tiny.rounds.count, tiny.strategy.name)
            read, written = opened.read(), load_adapter(run / "adapter", sites=lab.layers)
        assert read.tree.keys() == written.tree.keys()
        assert all(torch.equal(read.tree[name], written.tree[name]) for name in read.tree)


def test_a_refused_promotion_leaves_the_version_published(tmp_path: Path, run: Path) -> None:
    with Registry.open(tmp_path, own_identity()) as registry:
        with pytest.raises(PromotionError):
            publish_run(registry, run, "mail", alias="prod", gate=LossGate(-100.0))
        assert [str(version) for version in registry.versions()] == ["mail@v1"]
        assert registry.aliases() == []
