# SPDX-License-Identifier: Apache-2.0
"""post_hoc_ema against averages that were kept during the run, and its coefficients against integrals by quadrature."""

import pytest
import torch

from lightning_optkit.averaging import (
    PowerEMA,
    PowerSnapshot,
    load_weights,
    post_hoc_coefficients,
    post_hoc_ema,
    stored_snapshots,
)
from lightning_optkit.averaging.post_hoc_ema import snapshot_name
from lightning_optkit.averaging.power_ema import power_exponent

STEPS, STORED_EVERY = 4096, 256


@pytest.fixture(scope="module")
def run():
    """Weights of a random walk with a drift, the stored averages of two lengths, and the averages of all lengths."""
    generator = torch.Generator().manual_seed(0)
    drift = 1 - torch.exp(-torch.arange(1, STEPS + 1, dtype=torch.float64) / 800).view(-1, 1)
    path = drift * torch.randn(6, generator=generator, dtype=torch.float64) * 10
    path = path + 0.02 * torch.randn(STEPS, 6, generator=generator, dtype=torch.float64).cumsum(0)
    path = path + torch.randn(STEPS, 6, generator=generator, dtype=torch.float64)  # noise of each step
    snapshots = [
        PowerSnapshot({"w": kept_during(path[:end], std)}, std, end)
        for end in range(STORED_EVERY, STEPS + 1, STORED_EVERY)
        for std in (0.05, 0.1)
    ]
    return path, snapshots


def kept_during(path, std):
    average, kept = PowerEMA(std), path[0]
    for n, value in enumerate(path[1:], start=1):
        kept = torch.lerp(value, kept, average.decay_at(0.0, n))
    return kept


@pytest.mark.parametrize(("std", "tolerance"), [(0.05, 1e-9), (0.07, 0.02), (0.1, 1e-9), (0.13, 0.02), (0.2, 0.03)])
def test_it_is_the_average_of_that_length_kept_during_the_run(run, std, tolerance):
    path, snapshots = run
    wanted, made = kept_during(path, std), post_hoc_ema(snapshots, std)["w"]
    between = (kept_during(path, 0.05) - kept_during(path, 0.2)).norm()
    assert (made - wanted).norm() / between < tolerance


def test_an_earlier_end_is_the_average_of_the_run_until_then(run):
    path, snapshots = run
    wanted, made = kept_during(path[:2000], 0.12), post_hoc_ema(snapshots, 0.12, num_averaged=2000)["w"]
    assert (made - wanted).norm() / (wanted - path[1999]).norm() < 0.05


def test_the_coefficients_minimize_the_squared_difference_of_the_profiles():
    stored, std, end = [(0.05, 600), (0.1, 600), (0.05, 1000), (0.1, 1000)], 0.15, 1000
    at = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * end

    def profile(std, end):
        gamma = power_exponent(std)
        return torch.where(at < end, (gamma + 1) * (at / end) ** gamma / end, 0.0)

    profiles = torch.stack([profile(*each) for each in stored])
    best = torch.linalg.lstsq(profiles.T, profile(std, end).view(-1, 1)).solution[:, 0]
    actual = torch.tensor(post_hoc_coefficients(stored, std), dtype=torch.float64)
    torch.testing.assert_close(actual, best / best.sum(), rtol=1e-4, atol=1e-5)
    assert float(actual.sum()) == pytest.approx(1)


def test_a_stored_length_is_its_own_and_snapshots_given_twice_do_no_harm():
    assert post_hoc_coefficients([(0.05, 100), (0.1, 100)], 0.05) == pytest.approx([1, 0], abs=1e-9)
    twice = post_hoc_coefficients([(0.05, 100), (0.1, 100), (0.1, 100)], 0.1)
    assert twice == pytest.approx([0, 0.5, 0.5], abs=1e-6)


def test_files_are_read_one_by_one_and_written_without_the_state_of_a_training(tmp_path):
    paths = []
    for number, value in enumerate((1.0, 2.0)):
        weights = {"w": torch.full((2,), value, dtype=torch.bfloat16), "n": torch.tensor(number)}
        torch.save({"state_dict": weights, "optimizer_states": [1], "epoch": number}, tmp_path / f"{number}.ckpt")
        paths.append(tmp_path / f"{number}.ckpt")
    snapshots = [PowerSnapshot(path, std, 50) for path, std in zip(paths, (0.05, 0.1), strict=True)]
    made = post_hoc_ema(snapshots, 0.07, output=tmp_path / "made.ckpt")
    first, second = post_hoc_coefficients([(0.05, 50), (0.1, 50)], 0.07)
    torch.testing.assert_close(made["w"], torch.full((2,), first + 2 * second).bfloat16(), rtol=0, atol=0)
    assert made["w"].dtype == torch.bfloat16 and made["n"] == 1
    assert torch.equal(load_weights(tmp_path / "made.ckpt")["w"], made["w"])
    assert "optimizer_states" not in torch.load(tmp_path / "made.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: post_hoc_ema([], 0.1), ValueError, r"^post_hoc_ema\(snapshots="),
        (lambda: post_hoc_ema([{"w": torch.ones(1)}], 0.1), TypeError, r"^post_hoc_ema\(snapshots="),
        (
            lambda: PowerSnapshot({}, 0.3, 1),
            ValueError,
            r"^PowerSnapshot\(std=0\.3\): std must be in \[1e-4, 0\.288\]\.$",
        ),
        (
            lambda: PowerSnapshot({}, 0.1, 0),
            ValueError,
            r"^PowerSnapshot\(num_averaged=0\): num_averaged must be an int",
        ),
        (lambda: PowerSnapshot(3, 0.1, 1), TypeError, r"^PowerSnapshot\(checkpoint="),
        (lambda: post_hoc_ema([PowerSnapshot({}, 0.1, 1)], 0.5), ValueError, r"^post_hoc_ema\(std=0\.5\): std must be"),
        (
            lambda: post_hoc_ema([PowerSnapshot({"w": torch.ones(n)}, 0.1, n) for n in (1, 2)], 0.1),
            ValueError,
            r"^post_hoc_ema\(snapshots=\[\.\.\.\]\): .*'w' has shape",
        ),
    ],
)
def test_what_is_no_snapshot_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_stored_snapshots_are_listed_by_their_updates(tmp_path):
    for std, count in ((0.1, 20), (0.05, 100), (1e-4, 3), (0.05, 20)):
        torch.save({"state_dict": {"w": torch.full((2,), float(count))}}, tmp_path / snapshot_name(std, count))
    (tmp_path / "power_ema-std=0.1-num_averaged=7.ckpt").touch()
    found = stored_snapshots(tmp_path)
    assert [(each.std, each.num_averaged) for each in found] == [(1e-4, 3), (0.05, 20), (0.1, 20), (0.05, 100)]
    made = post_hoc_ema([each for each in found if each.std == 0.05], std=0.05)
    torch.testing.assert_close(made["w"], torch.full((2,), 100.0))
    with pytest.raises(ValueError, match="it must be a folder with files of PowerSnapshots"):
        stored_snapshots(tmp_path / "power_ema-std=0.1-num_averaged=7.ckpt")
    with pytest.raises(FileNotFoundError, match=r"dirpath='.*nope'\): dirpath must be a folder, and there is none\.$"):
        stored_snapshots(tmp_path / "nope")
