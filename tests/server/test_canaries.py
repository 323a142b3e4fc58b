"""Canary files: both spellings read the same, every mistake is one line, every rule is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import ConfigError
from meadow.server.canaries import Canary, read_canaries

TOML = """
[[canary]]
prompt = "What is a loom?"
contains = ["weav", "cloth"]
lacks = "I cannot"

[[canary]]
text = "Once upon"
matches = "^ a time"
tokens = 4
"""
SAME = (
    Canary("What is a loom?", contains=("weav", "cloth"), lacks=("I cannot",)),
    Canary(text="Once upon", matches="^ a time", tokens=4),
)


def test_both_spellings_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    rows = [
        {"prompt": "What is a loom?", "contains": ["weav", "cloth"], "lacks": "I cannot"},
        {"text": "Once upon", "matches": "^ a time", "tokens": 4},
    ]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    for name in ("c.toml", "c.jsonl"):
        assert tuple(read_canaries(tmp_path / name)) == SAME


def test_each_rule_is_judged_and_named() -> None:
    first, second = SAME
    assert first.faults("Something that weaves cloth.") == []
    lacking, having = first.faults("I cannot say, but it weaves.")
    assert "which lacks 'cloth'" in lacking and "which has 'I cannot'" in having
    assert second.faults(" a time there") == []
    (fault,) = second.faults("x a time")
    assert fault == "canary 'Once upon' was answered 'x a time', which does not match '^ a time'"


@given(st.text(min_size=1), st.text())
def test_what_must_be_said_may_not_be_lacking(part: str, answer: str) -> None:
    must, may_not = Canary("p", contains=(part,)), Canary("p", lacks=(part,))
    assert bool(must.faults(answer)) != bool(may_not.faults(answer)) == (part in answer)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.toml", "", "holds no canary"),
        ("c.toml", "[canary", "is not valid TOML"),
        ("c.toml", "[[prompt]]\nx = 1", "something else than canaries"),
        ("c.toml", '[[canary]]\nprompt = "a"\ncontain = ["b"]', "unknown key contain .*contains"),
        ("c.toml", '[[canary]]\nprompt = "a"', "would pass whatever is said"),
        ("c.toml", '[[canary]]\ncontains = "b"', "neither or both of prompt and text"),
        ("c.toml", '[[canary]]\nprompt = "a"\ntext = "b"\nlacks = "c"', "neither or both"),
        ("c.toml", '[[canary]]\nprompt = "a"\nmatches = "("', "no regular expression"),
        ("c.toml", '[[canary]]\nprompt = "a"\ncontains = [""]', "asks for empty text"),
        ("c.toml", '[[canary]]\nprompt = "a"\nlacks = "b"\ntokens = 0', "tokens is 0"),
        ("c.toml", '[[canary]]\nprompt = 3\nlacks = "b"', "prompt is 3"),
        ("c.jsonl", "{}\n{", "line 2 is not JSON"),
        ("c.jsonl", "[1]", "line 1 is no table"),
        ("c.jsonl", "\udc80", "not UTF-8"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=said) as refused:
        read_canaries(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*c.toml: No such file"):
        read_canaries(tmp_path / "c.toml")
