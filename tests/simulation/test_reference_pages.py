"""Generated pages: equal to what the code gives, and complete."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from meadow.config import Config, parse
from meadow.peft_adapters.base_model import sites
from meadow.simulation import reference_pages as pages
from meadow.simulation import strategy_table
from meadow.simulation.pretrain_nano import build_model
from meadow.strategies.registry import STRATEGIES, make, options_of

ROOT = Path(__file__).parents[2]
HINT = "run `python -m meadow.simulation.reference_pages`"


@pytest.mark.parametrize("path", [pages.RUN_TOML, pages.STRATEGY_PAGE])
def test_the_page_on_disk_is_what_the_code_gives(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == pages.pages()[path], HINT


def test_the_readmes_table_is_what_the_code_gives() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.BEGIN in text
    table = strategy_table.markdown(strategy_table.rows())
    assert pages.with_table(text, table) == text, HINT


def test_every_key_of_run_toml_is_on_its_page() -> None:
    page = pages.run_toml_page()
    for section in dataclasses.fields(Config):
        text = page.partition(f"\n## [{section.name}]\n")[2].partition("\n## ")[0]
        for key in dataclasses.fields(getattr(Config(), section.name)):
            assert section.name == "strategy" or f"| `{key.name}` |" in text


def test_the_whole_file_on_the_page_is_the_default_run() -> None:
    block = pages.run_toml_page().partition("```toml\n")[2].partition("```")[0]
    assert tomllib.loads(block)["format"] == 1
    assert parse(block) == Config()


def test_every_option_of_every_strategy_is_on_its_page() -> None:
    page = pages.strategies_page()
    for name, kind in STRATEGIES.items():
        text = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert kind.paper in text or kind.paper.removeprefix("arXiv ") in text
        for option in options_of(kind):
            assert f"| `{option.name}` |" in text


def test_rewriting_changes_only_what_is_between_the_markers(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n", encoding="utf-8")
    pages.main(tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{pages.BEGIN}\n| strategy |")
    assert text.endswith(f"|\n{pages.END}\nafter\n")
    assert "old" not in text
    assert (tmp_path / pages.RUN_TOML).is_file()
    assert (tmp_path / pages.STRATEGY_PAGE).is_file()


@pytest.mark.parametrize("text", ["no markers", f"{pages.BEGIN} alone", f"{pages.END} alone"])
def test_a_text_without_both_markers_stays(text: str) -> None:
    assert pages.with_table(text, "table") == text


# --- the table's figures -----------------------------------------------------------------------


def test_the_tables_layers_are_nanos() -> None:
    model = build_model()
    expected = tuple(sites(model, ["all-linear"]))
    assert strategy_table.sites_of(model.config.to_dict()) == expected
    assert strategy_table.nano_sites() == expected


def test_bytes_are_those_of_the_tensors_that_travel() -> None:
    """Counted by hand for nano's seven shapes in five layers: 4 r (in + out) bytes, and headers."""
    shapes = [(256, 576), (576, 256), (576, 256), (128, 256), (256, 256), (256, 256), (128, 256)]
    a = 5 * sum(4 * 8 * columns for _, columns in shapes)
    b = 5 * sum(4 * 8 * rows for rows, _ in shapes)
    header = 11_000
    by_name = {row["name"]: row for row in strategy_table.rows()}
    for name, up, down in (
        ("fedavg_lora", a + b, a + b),
        ("ffa_lora", b, b),
        ("fedsa_lora", a, a),
        ("diloco", a + b, a + b),
    ):
        assert up <= by_name[name]["least_bytes_up"] <= by_name[name]["bytes_up"] <= up + header
        assert down <= by_name[name]["bytes_down"] <= down + header
    turns = by_name["rolora"]
    assert a <= turns["least_bytes_up"] <= a + header
    assert b <= turns["bytes_up"] <= b + header
    side = 16 * (a + b)  # rank 128
    assert by_name["flora"]["least_bytes_down"] < header
    assert side <= by_name["flora"]["bytes_down"] <= side + header
    core = 4 * 64 * 64
    for name, up in (("fedkseed", strategy_table.STEPS), ("pool_lora", core)):
        assert up <= by_name[name]["bytes_up"] <= up + 400
        assert core <= by_name[name]["bytes_down"] <= core + 400
        assert by_name[name]["rank"] == 64
    assert a + b + side <= by_name["fedex_lora"]["bytes_down"] <= a + b + side + 2 * header


def test_what_the_table_calls_a_secure_sum_is_one() -> None:
    """Where it says yes, the default reducer's total is a plain weighted mean and nothing more."""
    from meadow.strategies.base import Mean, Turn

    for row in strategy_table.rows():
        reducer = make(row["name"], {}).reducer(Turn(1, 2, 1))
        assert row["secure_sum"] == (type(reducer) is Mean)


def test_lines_of_code_leave_prose_out() -> None:
    source = (
        '"""Doc\n\nmore."""\n\n# why\nx = 1  # so\n\ndef f():\n    """Doc."""\n    return "s"\n'
    )
    assert strategy_table.lines_of_code(source) == 3
    assert strategy_table.lines_of_code("") == 0
