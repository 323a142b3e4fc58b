"""Faults of a vLLM server, its folder or the registry: the publisher goes on, and mends them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import BASE
from registries import FILES, adapter, place
from vllm_stage import Stage, name_of, play, said_by

from meadow.server.canaries import Canary
from meadow.server.vllm_publisher import Shelf
from meadow.store import Disk


def test_a_server_that_refuses_keeps_the_alias_where_it_is(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.servers[1].refuses = 500
        stage.promote(2)
        assert not await stage.settle(3)
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert name_of(1) in stage.servers[0].adapters and name_of(1) in stage.servers[1].adapters
        (fault,) = stage.publisher.faults.values()
        assert "refuses /v1/load_lora_adapter (500): LoRA rank 64 is greater" in fault
        assert len([text for text in stage.said if "rank 64" in text]) == 1, "told once"
        stage.servers[1].refuses = 0
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(2) and not stage.publisher.faults

    play(tmp_path, scene)


def test_a_version_that_does_not_answer_is_not_served(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.servers[0].mute = True
        stage.promote(2)
        await stage.settle(2)
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert "refuses /v1/completions (500)" in str(stage.publisher.faults)

    play(tmp_path, scene)


def test_canaries_are_asked_on_every_server(tmp_path: Path) -> None:
    """The answer is the version's own: what the second must say, the first does not."""
    prompt = "What is a loom?"
    must = Canary(prompt, contains=(said_by(2, prompt, 4).split()[0],), tokens=4)

    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        assert stage.routes.aliases() == {}
        assert len(stage.publisher.faults) == 2, "on each"
        assert f"canary '{prompt}' was answered" in str(stage.publisher.faults)
        stage.promote(2)
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(2)

    play(tmp_path, scene, canaries=[must])


def test_a_server_that_was_restarted_is_given_all_again_before_it_is_asked(
    tmp_path: Path,
) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        stage.promote(2, "canary")
        await stage.settle()
        first, second = stage.servers
        await second.stop()
        await stage.settle()
        assert second.url in stage.publisher.faults
        assert stage.routes.having(name_of(1), [stage.replicas[0]]) is None
        await second.start()
        assert second.adapters == {}
        assert await stage.settle()
        assert stage.loaded() == [{name_of(1), name_of(2)}] * 2
        assert stage.routes.having(name_of(1), [stage.replicas[0]]) is stage.replicas[1]

    play(tmp_path, scene, wanted=("mail", "mail@canary"))


def test_adapters_that_a_server_lost_are_loaded_again(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.servers[0].adapters.clear()
        assert await stage.settle()
        assert stage.loaded() == [{name_of(1)}] * 2

    play(tmp_path, scene)


def test_a_server_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    """It gets no requests until it has what the others have."""

    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        await stage.servers[1].stop()
        stage.promote(2)
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(2)
        await stage.servers[1].start()
        await stage.settle()
        assert name_of(2) in stage.servers[1].adapters

    play(tmp_path, scene)


def test_a_slow_server_holds_up_its_alias_but_not_the_others_repair(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        assert await stage.settle()
        first, second = stage.servers
        first.slow = 3600.0
        stage.promote(2)
        second.adapters.clear()
        assert not await stage.settle(2)
        assert stage.loaded()[1] == {name_of(1), name_of(2)}
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert stage.publisher.faults == {first.url: f"{first.url} takes its time"}

    play(tmp_path, scene, patience=0.3)


def test_a_damaged_version_never_reaches_a_server(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.promote(2)
        weights = place(stage.registry, adapter(2).id) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
        await stage.settle(2)
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert stage.loaded() == [{name_of(1)}] * 2
        assert "was changed after it was signed" in str(stage.publisher.faults)
        stage.registry.keep("mail", adapter(2))  # published again
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(2)

    play(tmp_path, scene)


def test_a_registry_that_is_gone_and_back(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.promote(2)
        stage.registry.close()
        shutil.move(tmp_path / "registry", tmp_path / "away")
        await stage.settle(2)
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert stage.loaded() == [{name_of(1)}] * 2 and stage.publisher.faults
        shutil.rmtree(tmp_path / "registry", ignore_errors=True)
        shutil.move(tmp_path / "away", tmp_path / "registry")
        await stage.settle(2)
        assert stage.routes.aliases()["mail"].name == name_of(2)

    play(tmp_path, scene)


def test_a_registry_that_says_nothing_empties_no_server(tmp_path: Path) -> None:
    """As one whose disk is not mounted: what an earlier publisher left there goes on."""

    async def scene(stage: Stage) -> None:
        stage.promote(1)
        stage.promote(2, name="team/letters")
        await stage.settle()
        stage.registry.close()
        shutil.move(tmp_path / "registry", tmp_path / "away")
        await stage.restart()
        stage.clock.now += 99
        for _ in range(3):
            await stage.settle()
            stage.clock.now += 99
        assert stage.loaded() == [{name_of(1), name_of(2, "team/letters")}] * 2

    play(tmp_path, scene, wanted=("mail", "team/letters"))


def test_an_alias_that_is_not_there_yet(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        assert not await stage.settle()
        assert "the registry has no adapter mail" in str(stage.publisher.faults)
        stage.promote(1)
        assert await stage.settle()

    play(tmp_path, scene)


def test_a_shelf_that_was_emptied_is_filled_again(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        shutil.rmtree(tmp_path / "shelf")
        await stage.servers[0].stop()
        await stage.servers[0].start()
        assert await stage.settle()
        assert stage.loaded() == [{name_of(1)}] * 2

    play(tmp_path, scene)


@pytest.mark.parametrize("name", FILES)
def test_a_copy_that_lost_a_file_is_mended_once_a_server_cannot_load_it(
    tmp_path: Path, name: str
) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        (tmp_path / "shelf" / adapter(1).id / name).unlink()
        await stage.servers[0].stop()
        await stage.servers[0].start()
        await stage.settle(3)
        assert stage.loaded() == [{name_of(1)}] * 2
        assert stage.publisher.faults == {}

    play(tmp_path, scene)


def test_a_copy_that_was_cut_off_is_cleared_away(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        draft = tmp_path / "shelf" / (adapter(7).id + ".draft")
        draft.mkdir(parents=True)
        (draft / "adapter_config.json").write_text("{")
        stage.promote(1)
        assert await stage.settle()
        assert [path.name for path in (tmp_path / "shelf").iterdir()] == [adapter(1).id]

    play(tmp_path, scene)


def test_a_shelf_that_becomes_a_registry_loses_nothing(tmp_path: Path) -> None:
    """Copies that nothing needs are deleted; a registry's versions are no copies."""

    async def scene(stage: Stage) -> None:
        versions = tmp_path / "registry" / "versions"
        stage.publisher._shelf = Shelf(versions, versions, Disk())
        for number in (1, 2, 3):
            stage.promote(number)
        assert not await stage.settle()
        assert f"{tmp_path / 'registry'} is a registry" in str(stage.publisher.faults["shelf"])
        assert [stage.registry.verify(f"mail@v{number}").id for number in (1, 2, 3)] == [
            adapter(number).id for number in (1, 2, 3)
        ]

    play(tmp_path, scene)


class Mounted(Disk):
    """Of a file server that has been started again, and has forgotten what was open."""

    stale = True

    def make(self, folder: Path) -> None:
        if self.stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
        super().make(folder)


def test_a_shared_folder_that_is_away_for_a_moment(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = Mounted()
        stage.publisher._shelf = Shelf(tmp_path / "shelf", tmp_path / "shelf", disk)
        stage.promote(1)
        assert not await stage.settle()
        assert "the server that it is mounted from" in stage.publisher.faults["mail@prod"]
        disk.stale = False
        assert await stage.settle()

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "rows",
    [[{"id": ["x"]}], [{"id": {"a": 1}}, 7, None], [{"id": BASE, "root": [], "parent": ["y"]}]],
)
def test_a_list_of_models_that_makes_no_sense_ends_nobody(tmp_path: Path, rows: Any) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        assert await stage.settle()
        stage.servers[0].strange = rows
        assert not await stage.settle()
        stage.servers[0].strange = None
        assert await stage.settle(2)

    play(tmp_path, scene)


@pytest.mark.parametrize("text", [7, ["w"], {"a": "w"}])
def test_an_answer_that_is_no_text_is_none(tmp_path: Path, text: Any) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        stage.servers[0].says = text
        assert not await stage.settle()
        assert "what is no text" in str(stage.publisher.faults)
        assert not stage.routes.aliases()

    play(tmp_path, scene, canaries=[Canary(text="hi", matches="w")])


def test_no_server_at_all(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for server in stage.servers:
            await server.stop()
        stage.promote(1)
        assert not await stage.settle()
        assert stage.routes.aliases() == {} and len(stage.publisher.faults) == 2
        for server in stage.servers:
            await server.start()
        assert await stage.settle()

    play(tmp_path, scene)
