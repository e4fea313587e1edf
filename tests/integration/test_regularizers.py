# SPDX-License-Identifier: Apache-2.0
"""The contract of every regularizing callback.

It resumes bitwise, agrees over two processes and with every optimizer, and has no lasting effect.
"""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optkit import optimizers
from lightning_optkit.callbacks import Fuse
from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("regularizer_worker.py")
TOLERANCE = 2e-6  # eight steps in fp32; the gradients of two halves are added in another order


worker = load_worker(WORKER)
every_case = pytest.mark.parametrize("case", worker.CASES)


@pytest.fixture(autouse=True)
def own_random_numbers():
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes hold after it. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(WORKER, folder, *worker.CASES, processes=2, timeout=240)
    names = [*worker.CASES, *(f"{case}, sharded" for case in worker.SHARDED)]
    return {name: [torch.load(folder / f"{name} {rank}.pt") for rank in range(2)] for name in names}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@every_case
def test_both_ranks_hold_the_same_bits(ranks, case):
    assert_equal(*ranks[case])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in worker.CASES if case not in worker.RANDOM])
def test_two_processes_equal_one_with_the_same_global_batch(ranks, case):
    _, expected = worker.run(case)
    assert ranks[case][0]["steps"] == expected["steps"]
    assert (expected["steps"] < 8) == (case == "early stopping")
    assert_equal(ranks[case][0]["weights"], expected["weights"], TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", worker.SHARDED)
def test_sharded_by_fsdp2_it_is_as_in_one_process_and_resumes(ranks, case):
    first, second = ranks[f"{case}, sharded"]
    assert_equal(first, second)
    _, expected = worker.run(case)
    assert_equal(first["weights"], expected["weights"], TOLERANCE)
    assert first["steps"] == expected["steps"]
    assert first["sparsity"] == expected["sparsity"]
    assert_equal(first["resumed"]["weights"], first["weights"])


@pytest.mark.filterwarnings("ignore")
@every_case
def test_the_callback_makes_a_difference(case):
    """Or the comparisons above would prove nothing."""
    _, with_it = worker.run(case)
    dropout = worker.CASES[case]()[1]
    plain = worker.Classifier(dropout)
    worker.make_trainer([], 4).fit(plain)
    difference = max((with_it["weights"][name] - p).abs().max().item() for name, p in plain.named_parameters())
    assert difference > 1e-3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")
@every_case
def test_resumed_equals_uninterrupted_bit_for_bit(case, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, whole = worker.run(case, more=[keep], enable_checkpointing=True)
    _, resumed = worker.run(case, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(resumed, whole)


OURS = {"AdamW": optimizers.AdamW, "SGD": optimizers.SGD, "RMSprop": optimizers.RMSprop}
ARGUMENTS = {"AdamW": dict(weight_decay=0.0), "SGD": dict(momentum=0.9), "RMSprop": {}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", OURS)
@every_case
def test_with_torchs_optimizer_with_it_under_fuse_and_with_ours_the_numbers_are_the_same(case, rule):
    def configure(cls, **more):
        return lambda params: cls(params, lr=0.02, **ARGUMENTS[rule], **more)

    fuse = [] if "Fuse" in case else [Fuse(verbose=False)]
    torchs = configure(getattr(torch.optim, rule))
    _, expected = worker.run(case, configure=torchs)
    _, fused = worker.run(case, configure=torchs, more=fuse)
    _, ours = worker.run(case, configure=configure(OURS[rule]))
    for actual in (fused, ours):
        assert actual["steps"] == expected["steps"]
        assert_equal(actual["weights"], expected["weights"], 1e-5)


STAYS = {"optimizer_state", "load_optimizer_state_dict", "load_checkpoint", "load_model_state_dict"}


def traces(module):
    """All that a callback may have touched: attributes, modes, hooks, the optimizer and the strategy."""
    trainer, optimizer = module.trainer, module.trainer.optimizers[0]
    return dict(
        attributes={name: sorted(vars(child)) for name, child in module.named_modules()},
        methods=[name for name, value in vars(module).items() if callable(value) and name != "configure"],
        modes={name: (child.training, getattr(child, "p", None)) for name, child in module.named_modules()},
        hooks={
            f"{name} {kind}": len(hooks)
            for name, child in (*module.named_modules(), ("optimizer", optimizer))
            for kind, hooks in vars(child).items()
            if kind.endswith("_hooks")
        },
        needs_gradient=[p.requires_grad for p in module.parameters()],
        optimizer=type(optimizer),
        groups=[{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        # How it numbers and names saved parameters stays, for checkpoints that are written after the fit.
        strategy=sorted(vars(trainer.strategy).keys() - STAYS),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fail_at", [None, 1, 2])
@pytest.mark.parametrize("ours", [False, True], ids=["torch's AdamW", "ours"])
@every_case
def test_nothing_is_left_behind(case, ours, fail_at):
    left = []
    callbacks, dropout = worker.CASES[case]()
    for more in ([], callbacks):
        configure = (lambda params: optimizers.AdamW(params, lr=0.02, weight_decay=0.0)) if ours else worker.adamw
        module = worker.Classifier(copy.deepcopy(dropout), configure, fail_at)
        trainer = worker.make_trainer(more, epochs=2)
        with pytest.raises(KeyError) if fail_at else contextlib.nullcontext():
            trainer.fit(module)
        left.append(traces(module))
    assert left[1] == left[0]
