"""Servers and registry in step: every order of events, over servers that behave as vLLM does."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_vllm import BASE
from registries import adapter
from vllm_stage import Stage, name_of, play

# --- a new version -------------------------------------------------------------------------------


def test_a_version_is_loaded_everywhere_under_its_own_name_and_path(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        assert await stage.settle()
        assert stage.loaded() == [{name_of(1)}] * 2
        path = str(tmp_path / "shelf" / adapter(1).id)
        assert {server.adapters[name_of(1)][0] for server in stage.servers} == {path}
        assert stage.said == [f"mail is {name_of(1)} (mail@v1)"]
        for server in stage.servers:  # the golden prompt, asked of the version itself
            asked = [body for _, where, body in server.log if where == "/v1/completions"]
            assert [body["model"] for body in asked] == [name_of(1)]
            assert asked[0]["temperature"] == 0.0

    play(tmp_path, scene)


def test_the_alias_moves_once_all_have_it_and_the_old_one_goes_after_a_while(
    tmp_path: Path,
) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.promote(2)
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(2)
        assert stage.loaded() == [{name_of(1), name_of(2)}] * 2
        assert not await stage.settle(), "it still has to drop the old one"
        stage.clock.now += 9.9
        await stage.settle()
        assert stage.loaded() == [{name_of(1), name_of(2)}] * 2
        stage.clock.now += 0.2
        assert await stage.settle(2)
        assert stage.loaded() == [{name_of(2)}] * 2
        kept = [path.name for path in (tmp_path / "shelf").iterdir()]
        assert kept == [adapter(2).id]

    play(tmp_path, scene)


def test_a_rollback_before_the_old_one_is_dropped_costs_no_load(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        stage.promote(2)
        await stage.settle(2)
        stage.registry.rollback("mail")
        stage.clock.now += 60
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(1)
        assert [server.loads() for server in stage.servers] == [[name_of(1), name_of(2)]] * 2

    play(tmp_path, scene)


def test_requests_under_way_keep_their_version_loaded(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        await stage.settle()
        with stage.routes.request(name_of(1)):
            stage.promote(2)
            for _ in range(4):
                await stage.settle()
                stage.clock.now += 60
            assert stage.loaded() == [{name_of(1), name_of(2)}] * 2
        await stage.settle(2)
        assert stage.loaded() == [{name_of(2)}] * 2

    play(tmp_path, scene)


def test_several_adapters_and_aliases(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.promote(1)
        stage.promote(2, "canary")
        stage.promote(2, name="team/letters")
        assert await stage.settle()
        names = {name_of(1), name_of(2), name_of(2, "team/letters")}
        assert stage.loaded() == [names]
        found = {alias: served.name for alias, served in stage.routes.aliases().items()}
        assert found == {
            "mail": name_of(1), "mail@prod": name_of(1), "mail@canary": name_of(2),
            "team/letters": name_of(2, "team/letters"),
            "team/letters@prod": name_of(2, "team/letters"),
        }  # fmt: skip

    wanted = ("mail", "mail@canary", "team/letters")
    play(tmp_path, scene, servers=1, wanted=wanted)


def test_what_others_loaded_is_left_alone(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        foreign = {"theirs": ("/x", b""), f"other@{'0' * 12}": ("/y", b"")}
        stage.servers[0].adapters.update(foreign)
        stage.promote(1)
        await stage.settle(2)
        stage.clock.now += 99
        assert await stage.settle(2)
        assert stage.loaded()[0] == {*foreign, name_of(1)}

    play(tmp_path, scene)


def test_another_publishers_leftovers_and_wrong_paths_are_put_right(tmp_path: Path) -> None:
    """What an earlier process left goes; our name from another path is loaded anew."""

    async def scene(stage: Stage) -> None:
        first, second = stage.servers
        first.adapters[name_of(9)] = "/gone", b""
        second.adapters[name_of(1)] = "/elsewhere", b"other weights"
        stage.promote(1)
        await stage.settle(2)
        stage.clock.now += 99
        assert await stage.settle(2)
        assert stage.loaded() == [{name_of(1)}] * 2
        assert second.adapters[name_of(1)][1] == adapter(1).weights

    play(tmp_path, scene)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_it_ends_in_step(tmp_path: Path, seed: int) -> None:
    """Random promotions, restarts of servers and of the publisher, losses and refusals; at no time
    does an alias mean what a server that may be asked does not have."""
    import random

    dice = random.Random(seed)

    async def scene(stage: Stage) -> None:
        def consistent() -> None:
            for served in stage.routes.aliases().values():
                for replica, server in zip(stage.replicas, stage.servers, strict=True):
                    if served.name in replica.ready and replica.cards is not None:
                        weights = server.adapters[served.name][1]
                        assert weights == adapter(int(served.version.number)).weights

        for number in (1, 2, 3, 4):
            stage.promote(number)
        for _ in range(25):
            server = dice.choice(stage.servers)
            match dice.randrange(6):
                case 0:
                    stage.promote(dice.randint(1, 4))
                case 1:
                    await server.stop()
                    await server.start()
                case 2:
                    server.adapters.clear()
                case 3:
                    server.refuses = dice.choice([0, 500])
                case 4:
                    stage.clock.now += 20
                case 5:
                    await stage.restart()
            await stage.settle()
            consistent()
        for server in stage.servers:
            server.refuses = 0
        await stage.settle(2)
        stage.clock.now += 99
        await stage.settle(2)
        assert await stage.settle()
        assert stage.loaded() == [{stage.routes.aliases()["mail"].name}] * 2
        assert stage.routes.aliases()["mail"].version == stage.registry.resolve("mail")

    play(tmp_path, scene)


def test_bases_are_known_from_the_servers(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        await stage.settle()
        assert stage.routes.bases() == {BASE}
        target = stage.routes.target(BASE)
        assert target is not None and target.version == ""

    play(tmp_path, scene)


def test_a_long_list_of_models_is_read_whole(tmp_path: Path) -> None:
    """It comes in pieces: a server may have thousands of adapters of others."""

    async def scene(stage: Stage) -> None:
        for server in stage.servers:
            server.adapters |= {f"other-{n}": (f"/shelf/{n:0100}", b"") for n in range(3000)}
        stage.promote(1)
        await stage.settle()
        assert stage.routes.aliases()["mail"].name == name_of(1) and not stage.publisher.faults
        assert all(len(one.cards or {}) == 3002 for one in stage.replicas)

    play(tmp_path, scene)
