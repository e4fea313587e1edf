# SPDX-License-Identifier: Apache-2.0
"""The computed costs of a step on many GPUs, and that the page shows them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scaling

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_page_shows_what_the_script_prints():
    assert scaling.table(7e9, 291) in PAGE.read_text()


def test_one_gpu_sends_nothing_and_reads_what_a_step_reads():
    one = scaling.cost(4.8e9, 10, 1)
    assert one.norm == one.sharded == one.replicated == 0
    assert one.step == pytest.approx(0.032)


def test_memory_is_shared_out_and_the_host_is_not():
    few, many = scaling.cost(1e9, 100, 8), scaling.cost(1e9, 100, 1024)
    assert many.memory == pytest.approx(few.memory / 128) and many.host == few.host
    assert many.step == pytest.approx(many.host + many.norm) and many.norm > few.norm


def test_a_ring_sends_all_but_its_own_part_over_the_slowest_link():
    assert scaling.ring(8e9, 8) == pytest.approx(7e9 / 450e9)
    assert scaling.ring(16e9, 16) == pytest.approx(15e9 / 50e9)
