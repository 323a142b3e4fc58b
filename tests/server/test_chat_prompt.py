"""From texts and dialogues to tokens: as the model was trained."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_serving import tokenizer

from meadow.client.encode import encode
from meadow.client.rows import Row
from meadow.errors import TooLongError
from meadow.nano import FOLDER
from meadow.server.serving.chat_prompt import Prompts
from meadow.server.serving.openai_errors import ApiError
from meadow.server.serving.openai_types import ChatRequest, CompletionRequest

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('an assistant cannot begin') }}{% endif %}"
    "{{ m.role[0] }} {{ m.name if m.name is defined else '' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def nano() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def chat(*turns: tuple[str, str], name: str | None = None) -> ChatRequest:
    messages = [{"role": role, "content": content, "name": name} for role, content in turns]
    return ChatRequest.model_validate({"model": "m", "messages": messages})


def completion(prompt: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": prompt})


def trained_on(words: Any, prompt: str, response: str) -> list[int]:
    """The prompt's tokens, as a participant's trainer makes them."""
    row = Row("ada", prompt, response, "train", "")
    (example,) = encode([row], words, 10**6).examples
    unscored = int((example.labels == -100).sum())
    return example.ids[:unscored].tolist()


@pytest.mark.parametrize("question", ["What is a loom?", "two\nlines\n", "a ", "<s>a</s>", "é"])
def test_a_question_has_the_tokens_that_training_gave_it(nano: Any, question: str) -> None:
    (asked,) = Prompts(nano, len(nano)).of(chat(("user", question)))
    assert asked == trained_on(nano, question, "Something.")


def test_a_templates_question_has_the_tokens_that_training_gave_it(nano: Any) -> None:
    words = _with_template(nano)
    (asked,) = Prompts(words, len(words)).of(chat(("user", "What is a loom?")))
    assert asked == trained_on(words, "What is a loom?", "Something.")


def test_without_a_template_contents_stand_on_lines_of_their_own(nano: Any) -> None:
    prompts = Prompts(nano, len(nano))
    (asked,) = prompts.of(chat(("system", "Be brief."), ("user", "a?\n"), ("assistant", "b")))
    (plain,) = prompts.of(completion("Be brief.\na?\nb\n"))
    assert asked == plain and asked[0] == nano.bos_token_id


def test_a_template_reads_roles_and_names(nano: Any) -> None:
    words = _with_template(nano)
    prompts = Prompts(words, len(words))
    (asked,) = prompts.of(chat(("developer", "x"), ("user", "y"), name="ada"))
    assert words.decode(asked) == "s adax\nu aday\na "


def test_what_a_template_refuses_is_the_callers_fault(nano: Any) -> None:
    words = _with_template(nano)
    with pytest.raises(ApiError, match="an assistant cannot begin") as caught:
        Prompts(words, len(words)).of(chat(("assistant", "y")))
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_the_beginning_is_marked_once() -> None:
    words = tokenizer()
    prompts = Prompts(words, 64)
    assert prompts.of(completion("ab")) == [[0, 2, 3]]
    assert prompts.of(completion(["ab", "c"])) == [[0, 2, 3], [0, 4]]
    assert prompts.of(completion("<s>ab")) == [[0, 2, 3]]
    assert prompts.of(completion("")) == [[0]]
    assert prompts.of(completion([5, 6])) == [[5, 6]]  # ids are taken as they are


@pytest.mark.parametrize(("prompt", "message"), [([[]], "nothing"), ([1, 64], "64 tokens, no 64")])
def test_what_no_model_could_read_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        Prompts(tokenizer(), 64).of(completion(prompt))
    assert caught.value.status == 400 and caught.value.param == "prompt"


def test_what_is_too_long_whatever_its_tokens_are_is_not_even_read(nano: Any) -> None:
    """One caller's megabytes must not keep the others waiting."""
    longest = max(map(len, nano.get_vocab()))
    prompts = Prompts(nano, len(nano), 10)
    with pytest.raises(TooLongError, match="tokens of the prompt are more than 10"):  # it is read
        prompts.of(completion("x" * 10 * longest))
    for asked in (completion("x" * (10 * longest + 1)), chat(("user", "x" * 10**6))):
        with pytest.raises(TooLongError, match="more than 10 tokens") as caught:
            prompts.of(asked)
        assert caught.value.limit == 10


def test_token_ids_are_counted_before_anything_is_made_of_them(nano: Any) -> None:
    prompts = Prompts(nano, len(nano), 10)
    assert prompts.of(completion([7] * 10)) == [[7] * 10]
    with pytest.raises(TooLongError, match="11 tokens of the prompt are more than 10") as caught:
        prompts.of(completion([7] * 11))
    assert caught.value.limit == 10


def test_echo_repeats_a_text_as_it_was_and_ids_as_they_read(nano: Any) -> None:
    prompts = Prompts(nano, len(nano))
    assert prompts.text(" two  spaces <s>") == " two  spaces <s>"
    assert prompts.text(nano("def f(x):", add_special_tokens=False)["input_ids"]) == "def f(x):"


def _with_template(words: Any) -> Any:
    import copy

    words = copy.deepcopy(words)
    words.chat_template = TEMPLATE
    return words
