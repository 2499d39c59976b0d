"""Headers of safetensors files: where the library itself puts the tensors, and what a damaged one does."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from cluster.adapters.tensor_file import DTYPES, TensorPlace, decode, parse_header, read_header
from cluster.store.address import open_store

FUZZ = settings(derandomize=True, deadline=None, max_examples=300)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def place(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_places_are_where_the_library_wrote_the_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}-{index}": torch.randn(index + 1, 3, generator=generator).to(dtype)
        for dtype in DTYPES.values()
        for index in range(3)
    }
    tensors["scalar"] = torch.tensor(2.5)
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "file.safetensors").read_bytes()
    places = parse_header(data, len(data))
    assert places == read_header(open_store(str(tmp_path)), "file.safetensors")
    assert places.keys() == tensors.keys()
    for name, tensor in load_file(tmp_path / "file.safetensors").items():
        found = places[name]
        seen = decode(found, data[found.start : found.end])
        assert (seen.dtype, seen.shape) == (torch.float32, tensor.shape)
        assert torch.equal(seen, tensor.float())


def test_decode_copies() -> None:
    data = bytes(8)
    first = decode(TensorPlace("F32", (2,), 0, 8), data)
    first += 1
    assert data == bytes(8)


def test_a_dtype_we_do_not_read_still_has_its_place() -> None:
    data = save({"a": torch.ones(3, dtype=torch.int64)})
    (found,) = parse_header(data, len(data)).values()
    assert (found.dtype, found.shape, found.end - found.start) == ("I64", (3,), 24)


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        (struct.pack("<Q", 10**12) + b"{}", "claims 1000000000000 bytes in a file of 10"),
        (struct.pack("<Q", 2**64 - 1), "claims 18446744073709551615 bytes in a file of 8"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"\xff" * 9), "not JSON"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of([]), "not a JSON object"),
        (file_of({"a": 5}), "'a': no dtype"),
        (file_of({"a": None}), "'a': no dtype"),
        (file_of({"a": {}}), "'a': no dtype"),
        (file_of({"a": place(offsets=(0, 4, 8))}), "'a': no dtype"),
        (file_of({"a": place(offsets=5)}), "'a': no dtype"),
        (file_of({"a": place(dtype=5)}), "'a': malformed"),
        (file_of({"a": place(shape="2")}), "'a': malformed"),
        (file_of({"a": place(shape=(2.0,))}), "'a': malformed"),
        (file_of({"a": place(shape=(True,))}), "'a': malformed"),
        (file_of({"a": place(shape=(-2,))}), "'a': malformed"),
        (file_of({"a": place(shape=None)}), "'a': malformed"),
        (file_of({"a": place(shape=(0, 2**63), offsets=(0, 0))}), "'a': malformed"),
        (file_of({"a": place(shape=(2**62,) * 100_000, offsets=(0, 0))}), "'a': 100000 dimensions, at most 8"),
        (file_of({"a" * 10**6: 5}), "aaa...: no dtype"),
        (file_of(b'{"a": 1, "b": 2, "a": 1}'), "names 'a' twice"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}'), "'shape' twice"),
        (file_of({"a": place(offsets=("0", "8"))}), "'a': malformed"),
        (file_of({"a": place(offsets=(-8, 0))}, bytes(8)), "'a': malformed"),
        (file_of({"a": place()}, bytes(7)), "cut short"),
        (file_of({"a": place(offsets=(8, 0))}, bytes(8)), "cut short"),
        (file_of({"a": place(offsets=(0, 10**12))}, bytes(8)), "cut short"),
        (file_of({"a": place(shape=(3,))}, bytes(8)), "shape [3] of F32 does not fill its 8 bytes"),
        (file_of({"a": place(shape=(2**62, 2**62))}, bytes(8)), "does not fill its 8 bytes"),
        (file_of({"a": place(shape=(10**30, 10**30))}, bytes(8)), "'a': malformed"),
        (file_of({"a": place(dtype="F16")}, bytes(8)), "of F16 does not fill its 8 bytes"),
    ],
)
def test_a_header_that_lies_is_a_value_error_that_says_so(tmp_path: Path, data: bytes, seen: str) -> None:
    with pytest.raises(ValueError, match=re.escape(seen)):
        parse_header(data, len(data))
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(seen)):
        read_header(open_store(str(tmp_path)), "file")


@pytest.mark.parametrize("cut", [1, 20])
def test_a_file_that_ends_within_its_header_is_told(cut: int) -> None:
    data = save({"a": torch.ones(2)})
    header_end = 8 + int.from_bytes(data[:8], "little")
    with pytest.raises(ValueError, match="the header claims"):
        parse_header(data[: header_end - cut], header_end - cut)
    with pytest.raises(ValueError, match="ends in its header"):
        parse_header(data[: header_end - cut], len(data))


def parses_or_value_error(data: bytes) -> None:
    try:
        places = parse_header(data, len(data))
    except ValueError as error:
        assert 0 < len(str(error)) < 600
    else:
        assert all(8 <= place.start <= place.end <= len(data) for place in places.values())


@FUZZ
@given(st.binary(max_size=100))
def test_random_bytes_parse_or_are_a_value_error(data: bytes) -> None:
    parses_or_value_error(data)
    parses_or_value_error(file_of(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers(-1, 40) | st.sampled_from([2**63, 2**64, 10**30])


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=5) | st.just("__metadata__"),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPES, "I8", "?"]) | JSON,
                "shape": st.lists(NUMBERS, max_size=3) | JSON,
                "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=3,
    )
)
def test_any_json_header_parses_or_is_a_value_error(header: dict[str, object]) -> None:
    parses_or_value_error(file_of(header, bytes(32)))


@FUZZ
@given(st.data())
def test_a_flipped_byte_parses_or_is_a_value_error(draw: st.DataObject) -> None:
    data = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4).half()}))
    data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    parses_or_value_error(bytes(data))
