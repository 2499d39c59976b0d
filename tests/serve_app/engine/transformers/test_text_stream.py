"""Streamed text against the tokenizer's own decoding of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app.engine.transformers.text_stream import TextStream

TEXTS = [
    "Plain words, one after another.\n",
    "  two leading spaces and\ta tab",
    "naïve café, Ünïcödé, ελληνικά, русский, 日本語のテキスト, 한국어",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈, astral 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, combining e\u0301",
    "a real replacement character \ufffd in the text",
]


@pytest.fixture(scope="module")
def bytelevel(base_path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2's tokenizer: a leading space is dropped, unknown characters are bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "!",
        "lo",
        "▁a",
    ]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def stream_all(tokenizer, token_ids: list[int], **options) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, **options)
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces, True
    pieces.append(stream.finish())
    return pieces, stream.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_and_never_split_a_character(bytelevel, text: str) -> None:
    token_ids = bytelevel(text)["input_ids"]
    pieces, _ = stream_all(bytelevel, token_ids)
    assert "".join(pieces) == bytelevel.decode(token_ids, skip_special_tokens=True) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 1, "nothing was streamed"


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=30))
def test_any_tokens_add_up_to_the_tokenizers_own_text(bytelevel, token_ids: list[int]) -> None:
    pieces, _ = stream_all(bytelevel, token_ids)
    assert "".join(pieces) == bytelevel.decode(token_ids, skip_special_tokens=True)


def _byte_tokens(character: str) -> list[int]:
    return [3 + byte for byte in character.encode()]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["a", "é", "日", "🏳", "\n"]).map(_byte_tokens)
        | st.integers(0, 2).map(lambda i: [i])
        | st.integers(259, 264).map(lambda i: [i]),
        max_size=20,
    )
)
def test_tokens_add_up_where_a_leading_space_is_dropped_and_characters_are_bytes(
    metaspace, parts: list[list[int]]
) -> None:
    token_ids = [token for part in parts for token in part]
    pieces, _ = stream_all(metaspace, token_ids)
    assert "".join(pieces) == metaspace.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_given_out_as_the_tokenizer_does(bytelevel) -> None:
    token_ids = bytelevel("word 𝔘")["input_ids"][:-1]
    pieces, _ = stream_all(bytelevel, token_ids)
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == bytelevel.decode(token_ids)


def test_special_tokens_have_no_text(bytelevel) -> None:
    token_ids = [1, *bytelevel("Hi there")["input_ids"], 2, *bytelevel(" again")["input_ids"]]
    assert "".join(stream_all(bytelevel, token_ids)[0]) == "Hi there again"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", (" two",), "one"),
        ("one two three", ("e tw",), "on"),  # across a token's border
        ("one two three", ("three", "two"), "one "),  # the one that comes first
        ("one two three", ("one",), ""),
        ("aaaaab done", ("aab",), "aaa"),  # the beginning of a stop string, again and again
        ("line\nline\n\nend", ("\n\n",), "line\nline"),
        ("日本語のテキスト", ("のテ",), "日本語"),
    ],
)
def test_text_ends_before_the_first_stop_string(bytelevel, text: str, stop: tuple[str, ...], expected: str) -> None:
    pieces, stopped = stream_all(bytelevel, bytelevel(text)["input_ids"], stop=stop)
    assert stopped
    assert "".join(pieces) == expected


@pytest.mark.parametrize("stop", [("xyz",), ("three!",), ("e thx", "wo th three")])
def test_text_that_only_begins_like_a_stop_string_comes_out_whole(bytelevel, stop: tuple[str, ...]) -> None:
    pieces, stopped = stream_all(bytelevel, bytelevel("one two three")["input_ids"], stop=stop)
    assert not stopped
    assert "".join(pieces) == "one two three"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab \n", max_size=30),
    stop=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_string_ever_goes_out(bytelevel, text: str, stop: list[str]) -> None:
    """A character at a time, against a search in the text so far."""
    token_ids = [bytelevel(character)["input_ids"][0] for character in text]
    ends = [end for end in range(1, len(text) + 1) if any(s in text[:end] for s in stop)]
    expected = text
    if ends:
        expected = text[: min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]])]
    pieces, stopped = stream_all(bytelevel, token_ids, stop=stop)
    assert (stopped, "".join(pieces)) == (bool(ends), expected)


def test_stop_strings_do_not_count_before_min_tokens(bytelevel) -> None:
    token_ids = bytelevel("a b a b a b")["input_ids"]
    assert len(token_ids) == 6
    assert "".join(stream_all(bytelevel, token_ids, stop=("b",))[0]) == "a "
    assert "".join(stream_all(bytelevel, token_ids, stop=("b",), min_tokens=3)[0]) == "a b a "
    assert stream_all(bytelevel, token_ids, stop=("b",), min_tokens=7) == (
        ["a", " b", " a", " b", " a", " b", ""],
        False,
    )
