"""run.toml: what is written is read back, and what is wrong is named with its remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.config import (
    ClientsConfig,
    Config,
    DataConfig,
    ModelConfig,
    ServeConfig,
    StrategyConfig,
    load,
    options_of,
    parse,
    write,
)
from meadow.config_values import checked
from meadow.errors import ConfigError

NOWHERE = Path("/nowhere/at/all")
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values_of(hint: Any, least: float | None, most: float | None = None) -> st.SearchStrategy[Any]:
    """Any value that a key of this type may have."""
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(int(least or 0), int(most or 2**40))
    if hint is float:
        return st.floats(least or 0.0, most or 1e300, allow_subnormal=False)
    if hint is str:
        return words
    if hint == list[str]:
        return st.lists(words, max_size=3)
    if hint == dict[str, Any]:
        ranks = st.dictionaries(words, st.integers(0, 99), max_size=2)
        some = {"refine": words, "mu": st.floats(0, 1), "keep": st.booleans(), "ranks": ranks}
        return st.fixed_dictionaries({}, optional=some)
    return st.sampled_from(get_args(hint))


def sections(kind: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    parts = {
        part.name: values_of(
            hints[part.name], part.metadata.get("least"), part.metadata.get("most")
        )
        for part in dataclasses.fields(kind)
    }
    if "source" in parts:  # a relative path would be made absolute
        parts["source"] = st.sampled_from(["nano", "/text/rows.jsonl", "datasets:owner/name"])
    for name in {"registry", "held_out", "canaries"} & parts.keys():
        parts[name] = st.sampled_from(["", f"/kept/{name}"])
    return st.builds(kind, **parts)


configs = st.sampled_from(list(get_type_hints(Config).items())).flatmap(
    lambda section: st.builds(Config, **{section[0]: sections(section[1])})
)
"""Any value of every key of one section."""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    said = str(refused.value)
    assert "\n" not in said
    return said


@settings(max_examples=60, deadline=None)
@given(configs, st.booleans())
def test_what_is_written_is_read_back(config: Config, about: bool) -> None:
    assert parse(write(config, about), folder=NOWHERE) == config


def test_an_annotated_file_explains_every_key_and_means_the_same() -> None:
    text = write(Config(), about=True)
    assert parse(text) == parse(write(Config())) == parse("") == Config()
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        assert f"# {kind.__doc__}\n[{section.name}]" in text
        lines = text.split(f"\n[{section.name}]\n")[1].split("\n[")[0].splitlines()
        for name, _, about in options_of(kind):
            if (kind, name) != (StrategyConfig, "options"):
                line = next(line for line in lines if line.startswith(f"{name} = "))
                assert about and line.endswith(f"  # {about}")


def test_one_key_changes_one_key() -> None:
    config = parse('[model]\nrank = 4\n[strategy]\nname = "diloco"\nouter_lr = 0.5')
    assert config == Config().replace(
        model={"rank": 4}, strategy={"name": "diloco", "options": {"outer_lr": 0.5}}
    )
    assert config.scaling == 16.0 / 4


def test_whole_numbers_serve_as_floats() -> None:
    lr = parse("[clients]\nlr = 1").clients.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[clients]\nbatchs = 4", "run.toml: unknown key batchs in [clients] (did you mean batch"),
        ("[clients]\nqqqqqq = 4", "run.toml: unknown key qqqqqq in [clients] (known: batch, "),
        ("[client]\nsteps = 4", "run.toml: unknown section [client] (did you mean clients?)"),
        ("model = 3", "run.toml: model must be a section, [model]"),
        ('[model]\nrank = "8"', "run.toml: [model] rank is '8' (expected int)"),
        ("[model]\nrank = 8.0", "run.toml: [model] rank is 8.0 (expected int)"),
        ("[model]\nrank = true", "run.toml: [model] rank is True (expected int)"),
        ("[peer]\nsync_seconds = 9e9", "run.toml: [peer] sync_seconds is 9000000000.0"),
        ("[peer]\nwitnesses = 64", "run.toml: [peer] witnesses is 64 (at most 63)"),
        ("[rounds]\nfraction = 25", "run.toml: [rounds] fraction is 25.0 (at most 1)"),
        ("[rounds]\nquorum = 3", "run.toml: [rounds] quorum is 3.0 (at most 1)"),
        ("[model]\nrank = 0", "run.toml: [model] rank is 0 (at least 1)"),
        ('[model]\ndtype = "f2"', "run.toml: [model] dtype is 'f2' (one of 'float32', 'bfloat16')"),
        ('[model]\ntargets = "q_proj"', "run.toml: [model] targets is 'q_proj' (expected list)"),
        ("[model]\ntargets = [1]", "run.toml: [model] targets is 1 (expected str)"),
        ("[clients]\nlr = -1.0", "run.toml: [clients] lr is -1.0 (at least 1e-12)"),
        ("[clients]\nlr = nan", "run.toml: [clients] lr is nan (expected a finite number)"),
        ("[clients]\nlr = inf", "run.toml: [clients] lr is inf (expected a finite number)"),
        ("[clients]\nlr = 1" + "0" * 400, "run.toml: [clients] lr is 1"),
        ("[clients]\nlr = 2024-01-01", "run.toml: [clients] lr is datetime.date"),
        ("[strategy]\nname = 3", "run.toml: [strategy] name is 3 (expected str)"),
        ("format = 2", "run.toml has format 2; this meadow reads format 1"),
        ("[model", "run.toml is not valid TOML: "),
        ("[model]\nrank = 1\nrank = 2", "run.toml is not valid TOML: "),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(text: str, said: str) -> None:
    assert refusal(text).startswith(said)


@pytest.mark.parametrize("section", [part.name for part in dataclasses.fields(Config)])
def test_every_bound_holds_on_its_border(section: str) -> None:
    kind = get_type_hints(Config)[section]
    for part in dataclasses.fields(kind):
        least = part.metadata["least"]
        if least is not None:
            integral = get_type_hints(kind)[part.name] is int
            border, below = (least, least - 1) if integral else (float(least), least - 1e-3)
            config = parse(f"[{section}]\n{part.name} = {border}")
            assert getattr(getattr(config, section), part.name) == least
            assert f"(at least {least:g})" in refusal(f"[{section}]\n{part.name} = {below}")


def test_every_default_would_be_accepted() -> None:
    for section, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind)
        for part in dataclasses.fields(kind):
            value = getattr(kind(), part.name)
            least = part.metadata["least"]
            assert checked(value, hints[part.name], section, least) == value


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "llama"\n[data]\nsource = "rows.jsonl"\n')
    config = load(path)
    assert config.model.base == str((tmp_path / "llama").resolve())
    assert config.data.source == str((tmp_path / "rows.jsonl").resolve())


def test_where_a_run_publishes_is_relative_to_the_file_too(tmp_path: Path) -> None:
    text = '[serve]\nname = "mail"\nregistry = "kept"\ncanaries = "canaries.toml"\n'
    serve = parse(text, folder=tmp_path).serve
    assert serve == ServeConfig(
        "mail", str(tmp_path.resolve() / "kept"), canaries=str(tmp_path.resolve() / "canaries.toml")
    )
    assert parse(text, folder=tmp_path).shared() == Config().replace(data={"source": ""})


def test_names_that_are_no_paths_stay(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "org/model"\n[data]\nsource = "nano"\n')
    config = load(path)
    assert (config.model.base, config.data.source) == ("org/model", "nano")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*run.toml: No such file .*meadow init"):
        load(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="run.toml is not UTF-8 text"):
        load(tmp_path / "run.toml")


@settings(max_examples=40, deadline=None)
@given(configs, configs)
def test_digests_tell_settings_apart(first: Config, second: Config) -> None:
    shaping = [dataclasses.replace(config, serve=ServeConfig()) for config in (first, second)]
    assert (first.digest() == second.digest()) == (shaping[0] == shaping[1])
    assert parse(write(first), folder=NOWHERE).digest() == first.digest()


def another(value: Any) -> Any:
    """A different value of the same type."""
    if isinstance(value, dict):
        return {"more": 1}
    if isinstance(value, list):
        return [*value, "more"]
    return value + ("more" if isinstance(value, str) else 1)


def test_every_key_is_part_of_the_digest() -> None:
    """But for where adapters are published, which shapes no run."""
    digests = {Config().digest()}
    changed = 0
    for section in dataclasses.fields(Config):
        if section.name == "serve":
            continue
        for name, value, _ in options_of(type(getattr(Config(), section.name))):
            digests.add(Config().replace(**{section.name: {name: another(value)}}).digest())
            changed += 1
    assert len(digests) == changed + 1


def test_the_order_of_options_is_not_part_of_the_digest() -> None:
    texts = ("mu = 0.5\nkeep = true", "keep = true\nmu = 0.5")
    one, two = (parse(f"[strategy]\n{options}").digest() for options in texts)
    assert one == two != Config().digest()


def test_options_are_listed_with_their_defaults() -> None:
    rows = {name: (default, about) for name, default, about in options_of(ModelConfig)}
    assert rows["rank"] == (8, "LoRA rank r") and rows["targets"][0] == ["all-linear"]
    assert list(rows) == [part.name for part in dataclasses.fields(ModelConfig)]
    assert {default for _, default, _ in options_of(DataConfig) if default == "nano"} == {"nano"}


def test_a_list_default_is_no_ones_to_change() -> None:
    ModelConfig().targets.append("x")
    assert ModelConfig().targets == ["all-linear"]
    assert ClientsConfig() == Config().clients
