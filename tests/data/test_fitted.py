# SPDX-License-Identifier: Apache-2.0
"""The contract of every fitted transform."""

import copy
import io

import pytest
import torch

from lightning_optkit.data import Impute, MinMaxScale, OneHot, RobustScale, Standardize, Whiten

MAKERS = {
    "Standardize": Standardize,
    "MinMaxScale": MinMaxScale,
    "RobustScale": RobustScale,
    "Impute mean": lambda: Impute("mean", add_indicator=True),
    "Impute median": lambda: Impute("median"),
    "Impute mode": lambda: Impute("most_frequent"),
    "Whiten pca": Whiten,
    "Whiten zca": lambda: Whiten("zca"),
    "OneHot": OneHot,
}
every_transform = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


def rows(seed=0, num_rows=12):
    return torch.randint(0, 3, (num_rows, 3), generator=torch.Generator().manual_seed(seed)).double()


@every_transform
def test_state_dict_round_trip(make):
    fitted, file = make().fit(rows()), io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    restored = make()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(rows()), fitted(rows()))
    assert torch.equal(copy.deepcopy(fitted)(rows()), fitted(rows()))


@every_transform
def test_statistics_stay_in_float64_when_the_model_is_cast(make):
    fitted = make().fit(rows())
    expected = fitted(rows())
    torch.nn.Sequential(fitted).half().to(torch.bfloat16)
    assert torch.equal(fitted(rows()), expected)


@every_transform
def test_is_exported_with_the_model_for_any_number_of_rows(make):
    model = torch.nn.Sequential(make().fit(rows()), torch.nn.Identity())
    program = torch.export.export(model, (rows(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert torch.equal(program.module()(rows()[:5]), model(rows()[:5]))


def test_an_exported_one_hot_still_refuses_what_it_never_saw():
    program = torch.export.export(OneHot().fit(rows()), (rows(),)).module()
    with pytest.raises(RuntimeError, match=r"OneHot\(x\): must hold categories of the training set only"):
        program(rows() + 7)


@every_transform
def test_moves_with_the_module(make):
    assert {buffer.device.type for buffer in make().fit(rows()).to("meta").buffers()} == {"meta"}


@every_transform
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_floating_dtype_and_gives_integers_the_default_dtype(make, dtype):
    fitted = make().fit(rows())
    assert fitted(rows().to(dtype)).dtype == dtype
    assert fitted(rows().long()).dtype == torch.float32
    torch.testing.assert_close(fitted(rows().to(dtype)), fitted(rows()).to(dtype))


@every_transform
def test_merge_of_parts_equals_whole_whichever_is_empty(make):
    whole = make().fit(rows())
    merged = make().merge(make().partial_fit(rows()[:5])).merge(make().partial_fit(rows()[5:])).merge(make()).finalize()
    torch.testing.assert_close(merged(rows()), whole(rows()), rtol=1e-12, atol=1e-12)


@every_transform
def test_empty_batches_change_nothing(make):
    fitted = make().fit([rows()[:0], rows(), rows()[:0]])
    torch.testing.assert_close(fitted(rows()), make().fit(rows())(rows()), rtol=1e-12, atol=1e-12)


@every_transform
def test_fit_forgets_an_earlier_fit(make):
    again = make().fit(rows(1, 20)).fit(rows())
    assert torch.equal(again(rows()), make().fit(rows())(rows()))


@every_transform
@pytest.mark.parametrize("misuse", ["forward", "inverse"])
def test_applying_before_fit_is_refused(make, misuse):
    transform = make()
    with pytest.raises(RuntimeError, match=rf"{type(transform).__name__}\(fitted=False\): call fit\(batches\), or"):
        getattr(transform, misuse)(rows())


@every_transform
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (["a"], TypeError, r"\(x=list\): x must be a tensor; torch.as_tensor converts arrays, Vocabulary strings"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, r"\(x.dtype=torch.complex64\): x must be real"),
        (torch.zeros(3), ValueError, r"\(x.shape=\(3,\)\): a training batch must be \(N, D\) or larger"),
        (torch.zeros(2, 4), ValueError, r"\(x.shape=\(2, 4\)\): x must have 3 features, as in training, along"),
        (torch.tensor([[0.0, 0.0, torch.inf]]), ValueError, r"\(x\[\.\.\., 2\]=inf\): training values must be finite"),
    ],
    ids=["list", "complex", "vector", "four features", "infinite"],
)
def test_bad_training_batch_is_refused_and_leaves_no_trace(make, x, error, message):
    transform = make().partial_fit(rows())
    with pytest.raises(error, match=type(transform).__name__ + message):
        transform.partial_fit(x)
    assert torch.equal(transform.finalize()(rows()), make().fit(rows())(rows()))


@every_transform
def test_wrong_number_of_features_is_refused(make):
    transform = make().fit(rows())
    with pytest.raises(ValueError, match=rf"{type(transform).__name__}\(x.shape=\(2, 5\)\): x must have 3 features"):
        transform(torch.zeros(2, 5))


@every_transform
def test_fit_on_nothing_is_refused(make):
    with pytest.raises(ValueError, match=rf"{type(make()).__name__}\(batches=\[\]\): fitting needs at least one row"):
        make().fit([])


@pytest.mark.parametrize("make", [Standardize, MinMaxScale, RobustScale, Impute, Whiten])
def test_missing_feature_dim_is_refused(make):
    with pytest.raises(ValueError, match=r"\(feature_dim=2\): x of shape \(12, 3\) has no such dimension"):
        make(feature_dim=2).fit(rows())


@every_transform
def test_merging_with_a_stranger_is_refused(make):
    with pytest.raises(TypeError, match=r"\.merge\(other=ReLU\): other must be a"):
        make().merge(torch.nn.ReLU())


@every_transform
def test_merging_with_other_features_is_refused(make):
    with pytest.raises(ValueError, match=r"\.merge\(other=2 features\): other must have 3 features"):
        make().partial_fit(rows()).merge(make().partial_fit(rows()[:, :2]))


def test_merging_with_other_arguments_is_refused():
    with pytest.raises(ValueError, match=r"Impute\.merge\(other=Impute\('median'.*\): needs 'mean'"):
        Impute().merge(Impute("median"))


def test_gradients_flow_through_a_fitted_transform():
    x = rows().requires_grad_()
    scale = Standardize().fit(rows())
    scale(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 / scale.scale).expand_as(x))
