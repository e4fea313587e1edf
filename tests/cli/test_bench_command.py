# SPDX-License-Identifier: Apache-2.0
"""`optkit bench` times three ways of the same step, which do the same."""

import re

import pytest
import torch

from lightning_optkit.averaging.standalone import averages_of
from lightning_optkit.cli import bench_command, main


def test_it_shows_a_row_per_size_with_times_and_their_ratios(capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "SIZES", {"2 x (8, 8)": (2, 8), "1 x (16, 16)": (1, 16)})
    before = torch.get_num_threads()
    main(["bench", "--seconds", "0.05", "--threads", "1"])
    torch.set_num_threads(before)
    shown = capsys.readouterr().out
    for title in bench_command.SIZES:
        (row,) = (line for line in shown.splitlines() if title in line)
        ours, fused, plain, of_fused, _, of_plain = row.replace(title, "").split()
        assert float(ours) > 0 and float(of_fused) == pytest.approx(float(fused) / float(ours), rel=0.2)
        assert float(of_plain) == pytest.approx(float(plain) / float(ours), rel=0.2)
    assert re.search(r"1 thread\.", shown)


def test_the_three_variants_do_the_same():
    torch.manual_seed(0)
    nets = [torch.nn.ParameterList([torch.ones(4, 4)]) for _ in range(2)]
    for net in nets:
        net[0].grad = torch.arange(16.0).view(4, 4)
    step = bench_command._of_torch(nets[0], fused=False)
    optimizer = bench_command.AdamW(
        nets[1].parameters(), clip=bench_command.ClipNorm(1.0), average=bench_command.EMA(0.999)
    )
    for _ in range(3):
        step()
        optimizer.step()
    torch.testing.assert_close(nets[0][0], nets[1][0])
    assert averages_of(optimizer, bench_command.EMA(0.999)).keys() == {nets[1][0]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "--seconds 0.0: seconds must be in (0, inf)."),
        (["--device", "tpu"], "--device tpu: device must be one of 'cpu', 'cuda'."),
        (["--threads", "0"], "--threads 0: threads must be an integer >= 1."),
    ],
)
def test_a_mistake_is_one_sentence_with_the_option(capsys, words, said):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", *words])
    assert capsys.readouterr().err == f"optkit bench: {said}\n"


def test_without_the_extension_it_says_why_it_is_slow(capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "SIZES", {"1 x (8, 8)": (1, 8)})
    monkeypatch.setattr(bench_command, "extension", None)
    monkeypatch.setattr(bench_command, "missing_reason", "for a test")
    main(["bench", "--seconds", "0.01"])
    assert "Without the compiled extension (for a test): plain PyTorch" in capsys.readouterr().out
