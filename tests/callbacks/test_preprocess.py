# SPDX-License-Identifier: Apache-2.0
"""Preprocess in real Trainers: fitted on the training rows alone, applied in every stage to batches of every kind."""

import dataclasses
from functools import partial
from typing import NamedTuple

import pytest
import torch
from preprocess_cases import ELSEWHERE, ROWS, TARGETS, Seen, inputs_of, loader, running
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.callbacks import Preprocess
from lightning_optkit.data import Impute, MinMaxScale, OneHot, RobustScale, Standardize, Vocabulary, Whiten, resize

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)


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
