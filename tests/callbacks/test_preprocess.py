# SPDX-License-Identifier: Apache-2.0
"""Preprocess in real Trainers: fitted on the training rows only, applied everywhere, saved, undone."""

import dataclasses
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_optkit.callbacks import Fuse, Preprocess
from lightning_optkit.data import Impute, MinMaxScale, OneHot, RobustScale, Standardize, Vocabulary, Whiten, resize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*limit_val_batches=1.0.*"),
]

ROWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(3)) * 5 + 20
TARGETS = torch.randn(10, 2, generator=torch.Generator().manual_seed(4)) * 9 - 3
ELSEWHERE = torch.full((3, 4), 1e6)  # validation rows: would spoil every statistic


class Seen(pl.LightningModule):
    """Records its batches, by stage, in a list that Lightning does not inspect."""

    def __init__(self, configure=lambda module: torch.optim.SGD(module.parameters(), lr=0.01)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(4, 2)
        self.seen, self.configure = {}, configure

    def keep(self, stage, batch):
        self.seen.setdefault(stage, []).append(batch)

    def training_step(self, batch, batch_idx):
        self.keep("train", batch)
        x = batch[0] if isinstance(batch, list | tuple) else batch["x"]
        return self.net(x.float()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.keep("validate", batch)

    def test_step(self, batch, batch_idx):
        self.keep("test", batch)

    def predict_step(self, batch, batch_idx):
        self.keep("predict", batch)
        return batch

    def configure_optimizers(self):
        return self.configure(self)


def loader(*tensors, batch_size=4, **kwargs):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **kwargs)


def inputs_of(module, stage="train"):
    return torch.cat([batch[0] for batch in module.seen[stage]])


@pytest.fixture
def run(make_trainer):
    """run(module, callbacks, train, val, ckpt_path=None, **trainer): the Trainer after the fit."""

    def run_(module, callbacks, train=None, val=None, ckpt_path=None, **kwargs):
        trainer = make_trainer(
            *callbacks, **{"epochs": 1, "limit_val_batches": 1.0, "num_sanity_val_steps": 0, **kwargs}
        )
        trainer.fit(module, loader(ROWS, TARGETS) if train is None else train, val, ckpt_path=ckpt_path)
        return trainer

    return run_


def test_every_stage_sees_the_data_transformed_by_training_statistics(run):
    module, preprocess = Seen(), Preprocess(Standardize())
    trainer = run(module, [preprocess], val=loader(ELSEWHERE, ELSEWHERE), num_sanity_val_steps=2)
    expected = Standardize().fit(ROWS)
    torch.testing.assert_close(preprocess.transform[0].mean, ROWS.double().mean(dim=0), rtol=1e-12, atol=0)
    trainer.test(module, loader(ROWS, TARGETS), verbose=False)
    trainer.predict(module, DataLoader(ROWS, batch_size=5))
    assert torch.equal(inputs_of(module), expected(ROWS))
    assert torch.equal(inputs_of(module, "validate")[:3], expected(ELSEWHERE))
    assert torch.equal(inputs_of(module, "test"), expected(ROWS))
    assert torch.equal(torch.cat(module.seen["predict"]), expected(ROWS))  # a bare tensor is the field
    assert all(torch.equal(batch[1], part) for batch, part in zip(module.seen["train"], TARGETS.split(4), strict=True))


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass  # Lightning itself refuses frozen ones
class Example:
    x: torch.Tensor
    y: torch.Tensor


BATCHES = {
    "tuple": (tuple, 0, lambda batch: batch[0]),
    "list": (list, 0, lambda batch: batch[0]),
    "dict": (lambda pair: dict(zip("xy", pair, strict=True)), "x", lambda batch: batch["x"]),
    "named tuple by name": (lambda pair: Pair(*pair), "x", lambda batch: batch.x),
    "named tuple by position": (lambda pair: Pair(*pair), 0, lambda batch: batch.x),
    "dataclass": (lambda pair: Example(*pair), "x", lambda batch: batch.x),
    "nested": (lambda pair: {"in": [pair[1], {"x": pair[0]}]}, ["in", 1, "x"], lambda batch: batch["in"][1]["x"]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_kind_keep_it(run, kind):
    make, field, read = BATCHES[kind]
    module = Seen()
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net(read(batch)).mean())[1]
    collate = lambda rows: make([torch.stack(part) for part in zip(*rows, strict=True)])  # noqa: E731
    run(module, [Preprocess(Standardize(), field=field)], train=loader(ROWS, TARGETS, collate_fn=collate))
    found = module.seen["train"]
    assert type(found[0]) is type(make([ROWS, TARGETS]))
    assert torch.equal(torch.cat([read(batch) for batch in found]), Standardize().fit(ROWS)(ROWS))


def test_fields_and_chains_side_by_side(run):
    holed = ROWS.masked_fill(torch.rand(ROWS.shape, generator=torch.Generator().manual_seed(0)) < 0.3, torch.nan)
    module, inputs, target = Seen(), Preprocess([Impute("median"), Standardize()]), Preprocess(MinMaxScale(), field=1)
    run(module, [inputs, Preprocess(Whiten()), target], train=loader(holed, TARGETS))
    impute = Impute("median").fit(holed)
    scale = Standardize().fit(impute(holed))
    whiten = Whiten().fit(scale(impute(holed)))
    torch.testing.assert_close(inputs_of(module), whiten(scale(impute(holed))), rtol=0, atol=1e-5)
    mapped = torch.cat([batch[1] for batch in module.seen["train"]])
    torch.testing.assert_close(target.inverse(mapped), TARGETS)
    with pytest.raises(ValueError, match=r"Impute\(add_indicator=False\): inverse needs"):
        inputs.inverse(ROWS)


def test_text_becomes_ids_and_functions_are_stages(run):
    texts = ["a b", "b", "c b a", "b"]
    module = Seen()
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net.weight.mean())[1]
    encode = Preprocess([Vocabulary(), partial(torch.nn.functional.one_hot, num_classes=5)], field="text")
    run(module, [encode], train=DataLoader([{"text": text} for text in texts], batch_size=2))
    assert [batch["text"].shape for batch in module.seen["train"]] == [(2, 2, 5), (2, 3, 5)]
    assert encode.transform[0].tokens == ["<pad>", "<unk>", "b", "a", "c"]
    with pytest.raises(ValueError, match=r"Preprocess.inverse\(x\): one_hot has no inverse"):
        encode.inverse(torch.zeros(1))


def test_without_anything_to_fit_nothing_is_read(run):
    class Once(IterableDataset):
        reads = 0

        def __iter__(self):
            Once.reads += 1
            return iter(torch.rand(8, 1, 4, 4))

    module = Seen()
    module.training_step = lambda batch, batch_idx: (module.keep("train", [batch]), module.net.weight.mean())[1]
    run(module, [Preprocess(partial(resize, size=2))], train=DataLoader(Once(), batch_size=4))
    assert inputs_of(module).shape == (8, 1, 2, 2) and Once.reads == 1


# --- what is read, and that reading leaves no trace ---


class Odd(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        torch.rand(1)  # an augmenting dataset
        return ROWS[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS[:7])


ONLY = [1, 4, 8]
SETS = {
    "shuffled": (lambda: loader(ROWS, shuffle=True, drop_last=True), ROWS),
    "part of the set": (lambda: loader(ROWS, sampler=SubsetRandomSampler(ONLY)), ROWS[ONLY]),
    "drawing dataset": (lambda: DataLoader(Odd(), batch_size=3), ROWS),
    "stream": (lambda: DataLoader(Stream(), batch_size=3), ROWS[:7]),
    "list of batches": (lambda: [[ROWS[:2]], [ROWS[2:5]]], ROWS[:5]),
    "batch sampler": (lambda: DataLoader(TensorDataset(ROWS), batch_sampler=[[0, 1], [5]]), ROWS[[0, 1, 5]]),
    "batch sampler over a part": (
        lambda: DataLoader(TensorDataset(ROWS), batch_sampler=BatchSampler(SubsetRandomSampler(ONLY), 2, False)),
        ROWS[ONLY],
    ),
    "no batching": (lambda: DataLoader(TensorDataset(ROWS[:, None]), batch_size=None), ROWS),
}


@pytest.mark.parametrize("kind", SETS)
def test_each_training_row_is_read_once(run, kind):
    make, rows = SETS[kind]
    if kind == "list of batches":  # for Lightning a list is a list of loaders
        make = lambda: Batches([[ROWS[:2]], [ROWS[2:5]]])  # noqa: E731
    preprocess, module = Preprocess(Standardize()), Seen()
    module.training_step = lambda batch, batch_idx: module.net.weight.mean()
    run(module, [preprocess], train=make(), val=loader(ELSEWHERE, ELSEWHERE))
    stats = preprocess.transform[0]
    assert stats.stats["count"].tolist() == [len(rows)] * 4
    torch.testing.assert_close(stats.mean, rows.double().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.var, rows.double().var(dim=0, correction=0), rtol=1e-12, atol=0)


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_sampler_that_draws_is_read_through_the_loader(run):
    make = lambda: loader(ROWS, sampler=WeightedRandomSampler([1.0] + [0.0] * 9, 6))  # noqa: E731
    preprocess = Preprocess(Standardize())
    module = Seen()
    module.training_step = lambda batch, batch_idx: module.net.weight.mean()
    run(module, [preprocess], train=make())
    torch.testing.assert_close(preprocess.transform[0].mean, ROWS[0].double())


def test_a_sampler_that_repeats_rows_is_read_as_it_draws(run):
    data = TensorDataset(ROWS, TARGETS)
    preprocess = Preprocess(Standardize())
    run(Seen(), [preprocess], train=DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=23)))
    assert preprocess.transform[0].stats["count"].tolist() == [23] * 4


def test_loaders_side_by_side_are_each_read_once(run):
    module, preprocess = Seen(), Preprocess(Standardize(), field=["b", 0])
    module.training_step = lambda batch, batch_idx: module.net(batch["b"][0]).mean()
    run(module, [preprocess], train={"a": loader(ELSEWHERE, batch_size=1), "b": loader(ROWS)})
    assert preprocess.transform[0].stats["count"].tolist() == [10] * 4


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("own_sampler", [False, True])
def test_fitting_does_not_touch_the_random_numbers_of_the_run(run, own_generator, own_sampler):
    data = TensorDataset(torch.arange(10.0)[:, None].expand(10, 4))
    preprocess = Preprocess(Standardize())

    def train(*callbacks):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(1) if own_generator else None
        sampler = RandomSampler(data, replacement=True, generator=generator) if own_sampler else None
        kwargs = dict(sampler=sampler) if own_sampler else dict(shuffle=True, generator=generator)
        module = Seen()
        run(module, callbacks, train=DataLoader(data, batch_size=4, **kwargs), epochs=2)
        return inputs_of(module), torch.rand(3)

    plain, after = train()
    transformed, after_too = train(preprocess)
    assert torch.equal(plain, preprocess.inverse(transformed).round()) and torch.equal(after, after_too)


def test_an_iterator_is_refused(run):
    class Once(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    with pytest.raises(
        ValueError, match=r"Preprocess\(train_dataloaders=.*\): the training data must be readable more"
    ):
        run(Seen(), [Preprocess(Standardize())], train=iter(DataLoader(Once())))


# --- once fitted, never again ---


def test_a_resumed_run_takes_the_checkpoint_and_equals_an_uninterrupted_one(run, tmp_path, frozen):
    def train(epochs, rows, ckpt_path=None):
        module, preprocess = Seen(), Preprocess([Impute(add_indicator=False), Standardize()])
        trainer = run(module, [preprocess], train=loader(rows, TARGETS), epochs=epochs, ckpt_path=ckpt_path)
        return trainer, frozen(module.net.state_dict()), frozen(preprocess.state_dict())

    _, expected, learned = train(2, ROWS)
    trainer, _, _ = train(1, ROWS)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, relearned = train(2, ROWS, ckpt_path=tmp_path / "half.ckpt")
    assert resumed == expected and relearned == learned
    _, _, others = train(2, ROWS * 7, ckpt_path=tmp_path / "half.ckpt")  # other rows now: still not fitted again
    assert others == learned


def test_evaluation_of_a_checkpoint_in_a_new_process_needs_no_training_data(run, make_trainer, tmp_path):
    module = Seen()
    run(module, [Preprocess(Standardize())]).save_checkpoint(tmp_path / "done.ckpt")
    later, preprocess = Seen(), Preprocess(Standardize())
    make_trainer(preprocess).test(later, loader(ROWS, TARGETS), ckpt_path=tmp_path / "done.ckpt", verbose=False)
    assert torch.equal(inputs_of(later, "test"), Standardize().fit(ROWS)(ROWS))
    alone = Preprocess(Standardize())
    saved = torch.load(tmp_path / "done.ckpt", weights_only=True)["callbacks"][alone.state_key]
    alone.load_state_dict(saved)
    exported = torch.export.export(nn.Sequential(alone.transform, module.net.cpu()), (ROWS,)).module()
    torch.testing.assert_close(exported(ROWS), module.net(Standardize().fit(ROWS)(ROWS)))


@pytest.mark.parametrize("stage", ["resume", "test"])
def test_a_checkpoint_without_statistics_is_refused(run, make_trainer, tmp_path, stage):
    run(Seen(), []).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        RuntimeError, match=r"Preprocess\(field=0\): Standardize is not fitted; fit without ckpt_path, or"
    ):
        if stage == "resume":
            run(Seen(), [Preprocess(Standardize())], epochs=2, ckpt_path=tmp_path / "plain.ckpt")
        else:
            trainer = make_trainer(Preprocess(Standardize()))
            trainer.test(Seen(), loader(ROWS, TARGETS), ckpt_path=tmp_path / "plain.ckpt", verbose=False)


def test_a_fitted_transform_is_used_as_it_is(run):
    fitted, module = Standardize().fit(ROWS * 3), Seen()
    preprocess = Preprocess([fitted, MinMaxScale()])
    trainer = run(module, [preprocess])
    assert torch.equal(fitted.mean, Standardize().fit(ROWS * 3).mean)
    learned = preprocess.transform[1].data_min.clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(ROWS * 9, TARGETS))  # the same run goes on
    assert torch.equal(preprocess.transform[1].data_min, learned)


@pytest.mark.parametrize("configure", [
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
])  # fmt: skip
def test_training_on_raw_data_with_it_equals_training_on_transformed_data(run, configure):
    def train(x, *callbacks):
        module = Seen(configure)
        run(module, callbacks, train=loader(x, TARGETS), epochs=2)
        return module.net.weight.detach()

    expected = train(Standardize().fit(ROWS)(ROWS))
    assert torch.equal(train(ROWS, Preprocess(Standardize())), expected)
    torch.testing.assert_close(train(ROWS, Fuse(verbose=False), Preprocess(Standardize())), expected)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
@pytest.mark.parametrize("by_hook", [False, True])
def test_lower_precision_rounds_after_the_transform_where_digits_are_left(run, precision, dtype, by_hook):
    far = 1e6 + ROWS  # as good as constant in bfloat16, infinite in float16
    module, preprocess = Seen(), Preprocess([Impute(), Standardize()])
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net(batch[0]).mean())[1]
    if by_hook:  # that looks at the batch before the transform
        module.on_before_batch_transfer = lambda batch, idx: (module.keep("hook", batch), batch)[1]
    run(module, [preprocess, Preprocess(MinMaxScale())], train=loader(far, TARGETS), precision=precision)
    torch.testing.assert_close(preprocess.transform[1].var, far.double().var(dim=0, correction=0), rtol=1e-9, atol=0)
    scaled = Standardize().fit(far)(far).to(dtype)
    expected = MinMaxScale().fit(scaled)(scaled)
    assert inputs_of(module).dtype == dtype and torch.equal(inputs_of(module), expected)
    assert all(batch[1].dtype == dtype for batch in module.seen["train"])  # other fields are Lightning's business
    if by_hook:
        assert all(batch[0].dtype == torch.float32 for batch in module.seen["hook"])


def test_a_field_that_a_hook_makes_is_transformed_in_lower_precision(run):
    module = Seen()
    module.on_before_batch_transfer = lambda batch, idx: {"x": batch[0]}
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net.weight.mean())[1]
    run(module, [Preprocess(MinMaxScale(), field="x")], precision="bf16-true")
    rounded, found = ROWS.bfloat16(), torch.cat([batch["x"] for batch in module.seen["train"]])
    assert torch.equal(found, MinMaxScale().fit(rounded)(rounded))


def test_lower_precision_gets_its_own_dtype_also_from_integers(run):
    module, ids = Seen(), torch.arange(10)[:, None] % 4
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net(batch[0]).mean())[1]
    run(module, [Preprocess(OneHot())], train=loader(ids), precision="bf16-true")
    assert inputs_of(module).dtype == torch.bfloat16


# --- undone, and refused ---


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_trainer_and_module_are_as_before(make_trainer, fails):
    module = Seen()
    if fails:
        module.training_step = lambda batch, batch_idx: 1 / 0
    own = set(vars(module))
    trainer = make_trainer(Preprocess(Standardize()), Preprocess(Whiten()), epochs=1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, loader(ROWS, TARGETS))
    else:
        trainer.fit(module, loader(ROWS, TARGETS))
    assert "batch_to_device" not in vars(trainer.strategy)
    assert "convert_input" not in vars(trainer.precision_plugin)
    assert set(vars(module)) - own <= {"_hparams", "_param_requires_grad_state"}


def test_a_progress_bar_appears_when_fitting_takes_long(run, monkeypatch, capsys):
    from lightning_optkit.callbacks.seams import training_set

    monkeypatch.setattr(training_set, "_SILENT_SECONDS", -1.0)
    started = []
    monkeypatch.setattr(training_set.Progress, "start", lambda self: started.append(self.tasks[0].total))
    run(Seen(), [Preprocess(Standardize())])
    assert started and started[0] == 3
    run(Seen(), [Preprocess(Standardize(), progress=False)])
    assert set(started) == {3} and len(started) <= 3


@pytest.mark.parametrize("transform", [Standardize(), RobustScale()])  # one pass, and more of them
def test_without_a_bar_nothing_is_printed_not_even_an_empty_line(run, capsys, transform):
    run(Seen(), [Preprocess(transform)])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if not line.strip()] == []


HUGE = (
    torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**-10 * 2**20
).round() / 2**20


@pytest.mark.parametrize("transform", [Standardize, RobustScale, MinMaxScale])
def test_constant_columns_one_row_and_huge_offsets_give_finite_numbers(run, transform):
    rows = torch.cat([1e9 + HUGE, torch.full((64, 3), 7.0, dtype=torch.float64)], dim=1)
    for training in (rows, rows[:1]):
        module = Seen()
        run(module, [Preprocess(transform())], train=loader(training, batch_size=8))
        x = inputs_of(module)
        assert x.isfinite().all() and (x[:, 1:] == 0).all()
        if len(training) > 1 and transform is Standardize:
            torch.testing.assert_close(x.var(dim=0, correction=0)[0], torch.tensor(1.0).double(), rtol=1e-9, atol=0)


CITIES = ["New York", "Rome", "New York"]

BAD = {
    "infinite": (
        Standardize(),
        torch.tensor([[1.0], [torch.inf]]),
        r"Standardize\(x\[..., 0\]=inf\): training values must",
    ),
    "all missing": (
        Impute(),
        torch.full((2, 1), torch.nan),
        r"Impute\(x\[..., 0\]\): features \[0\] have no value in the training set; drop them, or",
    ),
    "one row": (Whiten(), torch.ones(1, 2), r"Whiten\(rows=1\): variances need at least 2 training rows"),
}


@pytest.mark.parametrize("kind", BAD)
def test_data_that_cannot_be_fitted_is_refused_in_one_sentence(run, kind):
    transform, rows, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        run(Seen(), [Preprocess(transform)], train=loader(rows))


def test_a_column_of_strings_becomes_columns_of_zeros_and_ones(run):
    module, encode = Seen(), Preprocess([Vocabulary(tokenize=None), OneHot(handle_unknown="ignore")], field="city")
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net.weight.mean())[1]
    train, new = (DataLoader([{"city": c} for c in cities], batch_size=2) for cities in (CITIES, ["Ulm", "Rome"]))
    run(module, [encode], train=train, val=new)
    assert torch.cat([batch["city"] for batch in module.seen["train"]]).tolist() == [[1, 0], [0, 1], [1, 0]]
    assert module.seen["validate"][0]["city"].tolist() == [[0, 0], [0, 1]]
    assert encode.transform[0].decode(encode.transform[1].inverse(torch.eye(2)).long()) == [["New York"], ["Rome"]]


def test_strings_and_unseen_categories_are_refused_in_one_sentence(run):
    with pytest.raises(TypeError, match=r"Standardize\(x=list\): x must be a tensor; .* Vocabulary strings"):
        run(Seen(), [Preprocess(Standardize(), field="x")], train=DataLoader([{"x": "a"}]))
    module = Seen()
    module.training_step = lambda batch, batch_idx: module.net.weight.mean()
    unseen = loader(torch.tensor([[1], [9]]))
    with pytest.raises(ValueError, match=r"OneHot\(x\[..., 0\]=9\): not a category of the training set"):
        run(module, [Preprocess(OneHot())], train=loader(torch.tensor([[1], [2]])), val=unseen)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Preprocess(3), TypeError, r"Preprocess\(transform=3\): transform must be a module, a function, or"),
        (lambda: Preprocess([Standardize(), "x"]), TypeError, r"Preprocess\(transform='x'\)"),
        (
            lambda: Preprocess(Standardize(), field=1.5),
            TypeError,
            r"Preprocess\(field=1.5\): field must be a position, a",
        ),
        (lambda: Preprocess(Standardize(), field=[]), TypeError, r"Preprocess\(field=\[\]\)"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (2, r"Preprocess\(field=2\): the batch must have this field; it is a list of 2"),
        ("x", r"Preprocess\(field='x'\): the batch must have this field; it is a list of 2"),
        ([0, "y"], r"Preprocess\(field='y'\): the batch must have this field; it is a tensor of shape \(4, 4\)"),
    ],
)
def test_a_field_that_is_not_there_is_refused(run, field, message):
    with pytest.raises(ValueError, match=message):
        run(Seen(), [Preprocess(Standardize(), field=field)])
