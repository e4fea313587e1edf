# SPDX-License-Identifier: Apache-2.0
"""A sample of the fuzz test of the norms' C++ entries; `fuzz_norm_entries.py` by itself runs as many as wanted."""

import sys
from pathlib import Path

import pytest

from lightning_optkit._native import extension

sys.path.insert(0, str(Path(__file__).parent))  # fuzz_norm_entries.py

pytestmark = [
    pytest.mark.skipif(extension is None, reason="the extension is not built"),
    pytest.mark.filterwarnings("ignore"),  # torch's, about the odd tensors that are made
]


@pytest.mark.parametrize("seed", range(4))
def test_calls_are_done_right_or_refused_in_a_sentence(seed):
    from fuzz_norm_entries import fuzz

    row = fuzz(calls=500, seconds=60.0, seed=seed)
    assert row["failed"] == 0, row["examples"]
    assert row["calls"] == 500 and row["accepted"] > 100 and row["refused"] > 100


def test_the_fuzz_test_sees_a_wrong_result(monkeypatch):
    import fuzz_norm_entries

    invoke = fuzz_norm_entries.invoke

    def off(name, arguments):
        found = invoke(name, arguments)
        return found if found is None else tuple(t * 1.5 for t in found)

    monkeypatch.setattr(fuzz_norm_entries, "invoke", off)
    assert fuzz_norm_entries.fuzz(calls=100, seconds=60.0, seed=0)["accepted_wrong"] > 20
