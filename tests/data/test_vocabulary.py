# SPDX-License-Identifier: Apache-2.0
"""Vocabulary: numbering, unknown words, padding, and the way back."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.data import Vocabulary

TEXTS = ["b a a", "a c b", "d"]
WORDS = st.lists(st.text("abcdé", min_size=1, max_size=2), min_size=1, max_size=6)


def test_numbers_by_falling_frequency_then_alphabet():
    assert Vocabulary().fit(TEXTS).tokens == ["<pad>", "<unk>", "a", "b", "c", "d"]


@pytest.mark.parametrize(("options", "kept"), [({"min_freq": 2}, ["a", "b"]), ({"max_tokens": 3}, ["a"])])
def test_drops_rare_tokens(options, kept):
    vocabulary = Vocabulary(**options).fit(TEXTS)
    assert vocabulary.tokens[2:] == kept and len(vocabulary) == 2 + len(kept)


def test_pads_cuts_and_marks_unknown_words():
    vocabulary = Vocabulary().fit(TEXTS)
    assert vocabulary.encode(["a z b", "c"]).tolist() == [[2, 1, 3], [4, 0, 0]]
    assert vocabulary.encode(["a z b", "c"], length=2).tolist() == [[2, 1], [4, 0]]
    assert vocabulary.encode(["", ""]).shape == (2, 0)
    assert vocabulary(["d"]).dtype == torch.int64


def test_a_category_of_several_words_is_one_token():
    vocabulary = Vocabulary(tokenize=None).fit(["New York", "Rome", "New York"])
    assert vocabulary.encode(["Rome", "New York", "New"]).tolist() == [[3], [2], [1]]


def test_words_that_look_special_are_unknown():
    vocabulary = Vocabulary().fit(["<pad> <unk> a"])
    assert vocabulary.encode(["<pad> <unk> a"]).tolist() == [[1, 1, 2]]


@given(st.lists(WORDS, min_size=1, max_size=6))
def test_decode_undoes_encode(texts):
    joined = [" ".join(words) for words in texts]
    vocabulary = Vocabulary().fit(joined)
    assert vocabulary.decode(vocabulary.encode(joined)) == texts


@given(st.lists(WORDS, min_size=2, max_size=6), st.integers(1, 5))
def test_merged_halves_equal_whole(texts, cut):
    joined = [" ".join(words) for words in texts]
    halves = [Vocabulary().partial_fit(part) for part in (joined[:cut], joined[cut:])]
    assert halves[1].merge(halves[0]).finalize().tokens == Vocabulary().fit(joined).tokens


def test_state_dict_round_trip():
    vocabulary, file = Vocabulary(tokenize=list).fit(["añb"]), io.BytesIO()
    torch.save(vocabulary.state_dict(), file)
    file.seek(0)
    restored = Vocabulary(tokenize=list)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.tokens == vocabulary.tokens and torch.equal(restored(["ña"]), vocabulary(["ña"]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Vocabulary()(["a"]), RuntimeError, r"Vocabulary\(fitted=False\): call fit\(texts\)"),
        (lambda: Vocabulary().fit([]), ValueError, r"Vocabulary\(texts=\[\]\): fitting needs at least one token"),
        (lambda: Vocabulary().fit(["a"]).partial_fit(["b"]), RuntimeError, r"Vocabulary\(fitted=True\): the counts"),
        (lambda: Vocabulary().partial_fit("a b"), TypeError, r"Vocabulary\(texts=str\): texts must be a sequence"),
        (lambda: Vocabulary().partial_fit([1]), TypeError, r"Vocabulary\(texts=list\): texts must be a sequence"),
        (lambda: Vocabulary(min_freq=0), ValueError, r"Vocabulary\(min_freq=0\): min_freq must be an integer >= 1"),
        (
            lambda: Vocabulary(max_tokens=1),
            ValueError,
            r"Vocabulary\(max_tokens=1\): max_tokens must be an integer >= 2",
        ),
        (lambda: Vocabulary(unk_token="<pad>"), ValueError, r"Vocabulary\(unk_token='<pad>'\): must differ"),
        (lambda: Vocabulary().fit(["a"]).encode(["a"], length=0), ValueError, r"\(length=0\): length must be an"),
        (
            lambda: Vocabulary().fit(["a"]).decode(torch.tensor([[3]])),
            ValueError,
            r"Vocabulary.decode\(id=3\): ids must be in \[0, 3\)",
        ),
        (lambda: Vocabulary().merge(torch.nn.ReLU()), TypeError, r"merge\(other=ReLU\): other must be a Vocabulary"),
    ],
)
def test_misuse_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
