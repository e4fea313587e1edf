# SPDX-License-Identifier: Apache-2.0
"""Sums over processes: those of torch's all-reduce, in place, and the same bits in every process."""

import pytest
import torch
import torch.distributed as dist

from lightning_optkit.step.shards import reduce_sum_

LENGTHS = (1, 2, 3, 150, 2**14 + 1)


def numbers(rank, length):
    return torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def process(rank, folder, num_processes):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_processes)
    sums = [numbers(rank, length) for length in LENGTHS]
    returned = [reduce_sum_(each, [dist.group.WORLD]) for each in sums]
    assert all(one is other for one, other in zip(sums, returned, strict=True))
    torch.save(sums, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4])  # powers of two exchange messages in pairs
def sums(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    torch.multiprocessing.spawn(process, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("place", range(len(LENGTHS)), ids=map(str, LENGTHS))
def test_every_process_has_the_same_sum_of_all(sums, place):
    first = sums[0][place]
    expected = torch.stack([numbers(rank, LENGTHS[place]) for rank in range(len(sums))]).sum(0)
    torch.testing.assert_close(first, expected, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(each[place], first) for each in sums[1:])
