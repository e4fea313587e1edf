# SPDX-License-Identifier: Apache-2.0
"""Mixtures per batch, example and pair against the formulas of `timm.data.Mixup`, one example at a time."""

import pytest
import torch
import torch.nn.functional as F

from lightning_optkit.data import CutMix, Mixup, MixupOrCutMix
from lightning_optkit.data._rectangles import by_area, by_sides

KINDS = {
    "mixup": lambda **options: Mixup(0.7, **options),
    "cutmix": lambda **options: CutMix(**options),
    "sides": lambda **options: CutMix(min_max=(0.3, 0.9), **options),
    "both": lambda **options: MixupOrCutMix(0.7, 1.0, **options),
    "both, sides": lambda **options: MixupOrCutMix(0.7, min_max=(0.3, 0.9), switch_p=0.7, **options),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_per = pytest.mark.parametrize("per", ["batch", "element", "pair"])


class FixedDraws:
    """Draws whose uniform numbers are given."""

    def __init__(self, *numbers):
        self.numbers = torch.tensor([numbers], dtype=torch.float64)

    def uniform(self, *shape):
        return self.numbers.expand(shape)


def make(kind, seed=0, **options):
    return KINDS[kind](generator=torch.Generator().manual_seed(seed), **options)


def images(count=8):
    return torch.rand(count, 3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(augment, x, soft):
    """Mixed inputs and targets of every example, from the weights, rectangles and permutation that are drawn."""
    drawn, draw, permute = {}, augment._drawn, augment.draws.partners

    def remember(name, value):
        drawn[name] = value
        return value

    augment._drawn = lambda count, inputs: remember("sets", draw(count, inputs))
    augment.draws.partners = lambda *args, **kwargs: remember("order", permute(*args, **kwargs))
    _, partners, shares = augment.mix(x)
    weights, boxes = drawn["sets"]
    order, last = drawn["order"].tolist(), len(x) - 1
    inputs, targets = x.clone(), soft.clone()
    for place, number in enumerate(order):
        # The k-th of the order is the partner of example k, or forms a pair with the k-th from the end.
        i, j = (number, order[last - place]) if augment.per == "pair" else (place, number)
        of = {"batch": 0, "element": i, "pair": min(place, last - place)}[augment.per]
        share = float(weights[of])
        top, bottom, left, right = [0] * 4 if boxes is None else boxes[of].tolist()
        if (bottom - top) * (right - left):
            inputs[i, :, top:bottom, left:right] = x[j, :, top:bottom, left:right]
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / (9 * 12), abs=1e-15)
        elif share < 1:
            inputs[i] = x[i] * share + x[j] * (1 - share)
        targets[i] = soft[i] * share + soft[j] * (1 - share)
        assert int(partners[i]) == j and share == (shares if isinstance(shares, float) else float(shares[i]))
    return inputs, targets, partners, weights


@every_kind
@every_per
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_every_example_follows_the_formulas(kind, per, p):
    labels, mixtures = torch.arange(8) % 5, 0
    runs = 40 if per == "batch" else 8
    for seed in range(runs):
        augment = make(kind, seed, per=per, p=p, num_classes=5, label_smoothing=0.2)
        smooth = F.one_hot(labels, 5) * 0.8 + 0.2 / 5
        inputs, targets, partners, shares = by_hand(make(kind, seed, per=per, p=p), images(), smooth.double())
        mixed, soft = augment(images(), labels)
        torch.testing.assert_close(mixed, inputs, rtol=0, atol=1e-14)
        torch.testing.assert_close(soft.double(), targets, rtol=0, atol=1e-6)
        assert sorted(partners.tolist()) == list(range(8))
        mixtures += int((shares < 1).sum())
    sets = runs * {"batch": 1, "element": 8, "pair": 4}[per]
    assert mixtures >= 0.9 * sets if p == 1 else 0.2 * sets <= mixtures <= 0.75 * sets


@every_kind
def test_pairs_are_mixed_with_each_other_alike(kind):
    for count in (8, 7, 1):
        mixed, partners, shares = make(kind, per="pair").mix(images(count))
        assert torch.equal(partners[partners], torch.arange(count)) and torch.equal(shares[partners], shares)
        assert int((partners == torch.arange(count)).sum()) == count % 2  # an odd one has no partner
        torch.testing.assert_close(mixed + mixed[partners], images(count) + images(count)[partners])


@every_kind
def test_elements_have_weights_of_their_own(kind):
    _, _, shares = make(kind, per="element").mix(images(16))
    assert shares.dtype == torch.float64 and len(set(shares.tolist())) > 8


@every_per
def test_switch_chooses_between_the_two(per):
    """A mixed image of zeros and ones holds other numbers only where it was blended."""
    x = torch.stack([torch.full((1, 8, 8), float(i % 2)) for i in range(16)])
    for switch_p, blends in ((0.0, True), (1.0, False)):
        mixed = MixupOrCutMix(switch_p=switch_p, per=per).mix(x)[0]
        assert bool(((mixed > 0) & (mixed < 1)).any()) is blends
    counts = [0, 0]
    for seed in range(40):
        each = MixupOrCutMix(switch_p=0.25, per="element", generator=torch.Generator().manual_seed(seed))
        blended = ((each.mix(x)[0] % 1) > 0).flatten(1).any(1)
        counts[0], counts[1] = counts[0] + int(blended.sum()), counts[1] + len(x)
    assert counts[0] / counts[1] == pytest.approx(0.75 * 8 / 15, abs=0.06)  # a partner of the other kind: 8 of 15


@every_kind
def test_probability_of_no_mixture(kind):
    augment, x = make(kind, p=0.3), images()
    mixed = sum(int(not torch.equal(augment.mix(x)[0], x)) for _ in range(300))
    assert mixed / 300 == pytest.approx(0.3, abs=0.1)
    assert torch.equal(make(kind, p=0.0, per="element").mix(x)[0], x)


def test_rectangles_are_those_of_timm_under_fixed_draws():
    """rand_bbox: [c - cut // 2, c + (cut + 1) // 2], clipped; rand_bbox_minmax: sides, then their place inside."""
    cases = [
        ((9, 12), 0.5, (0.4, 0.9)),
        ((5, 7), 0.9, (0.0, 0.1)),
        ((1, 1), 0.99, (0.5, 0.5)),
        ((6, 6), 0.04, (0.3, 0.3)),
    ]
    for (height, width), area, (row, column) in cases:
        expected = []
        for size, place in ((height, row), (width, column)):
            cut, center = int(size * area**0.5), int(size * place)
            expected += [min(max(center - cut // 2, 0), size), min(max(center + (cut + 1) // 2, 0), size)]
        got = by_area(FixedDraws(row, column), torch.tensor([area], dtype=torch.float64), height, width)
        assert got[0].tolist() == expected
    for (height, width), draws in [((10, 20), (0.0, 0.0, 0.99, 0.99)), ((7, 5), (0.5, 0.5, 0.25, 0.75))]:
        expected = []
        for size, (side, place) in zip((height, width), (draws[:2], draws[2:]), strict=True):
            least, most = int(size * 0.2), int(size * 0.8)
            cut = least + int(side * (most - least))
            start = int(place * (size - cut + 1))
            expected += [start, start + cut]
        assert by_sides(FixedDraws(*draws), 1, (0.2, 0.8), height, width)[0].tolist() == expected


@every_per
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_labels_of_their_own_are_smoothed_toward_one_half(per, dtype):
    labels = (torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) > 0.5).to(dtype)
    augment = make("both", per=per, multi_label=True, label_smoothing=0.1, num_classes=5)
    _, expected, *_ = by_hand(make("both", per=per), images(), labels.double() * 0.9 + 0.05)
    torch.testing.assert_close(augment(images(), labels)[1].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@every_per
def test_narrow_images_keep_their_dtype_and_exact_pixels(per, dtype):
    x = (images() * 255).to(dtype)
    mixed, partners, _ = make("cutmix", per=per).mix(x)
    assert mixed.dtype == dtype and bool(((mixed == x) | (mixed == x[partners])).all())
    if dtype == torch.bfloat16:
        blended, partners, shares = make("mixup", per="element").mix(x)
        weight = shares.view(-1, 1, 1, 1)
        exact = weight * x.double() + (1 - weight) * x[partners].double()
        assert float(((blended.double() - exact) / exact.clamp(min=1)).abs().max()) <= 2**-8


def test_a_partner_without_weight_leaves_no_trace():
    x = images(2)
    x[1] = torch.inf
    mixed = make("mixup", per="element", p=0.0).mix(x)[0]
    assert torch.equal(mixed, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, r"\(p=1.5\): p must be in \[0, 1\]"),
        ({"per": "example"}, r"\(per='example'\): per must be"),
        ({"label_smoothing": 1.0}, r"\(label_smoothing=1.0\): label_smoothing must be in \[0, 1\)"),
    ],
)
@every_kind
def test_wrong_arguments_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": 0.0}, r"MixupOrCutMix\(mixup_alpha=0.0\): mixup_alpha must be in \(0, inf\)"),
        ({"cutmix_alpha": -1.0}, r"MixupOrCutMix\(cutmix_alpha=-1.0\): cutmix_alpha must be in \(0, inf\)"),
        ({"switch_p": 2}, r"MixupOrCutMix\(switch_p=2\): switch_p must be in \[0, 1\]"),
        ({"min_max": (0.8, 0.2)}, r"MixupOrCutMix\(min_max=\(0.8, 0.2\)\): min_max must be least < largest"),
        ({"min_max": (0.2, 1.2)}, r"MixupOrCutMix\(min_max=1.2\): min_max must be in \[0, 1\]"),
    ],
)
def test_wrong_arguments_of_the_choice_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixupOrCutMix(**options)


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ({"label_smoothing": 0.1}, torch.rand(8), r"\(label_smoothing=0.1\): targets must have classes"),
        (
            {"multi_label": True, "num_classes": 3},
            torch.arange(8) % 3,
            r"\(multi_label=True\): targets must be \(N, C\)",
        ),
    ],
)
@every_kind
def test_targets_that_do_not_fit_the_options_are_refused(kind, options, targets, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)(images(), targets)


def test_integer_images_cannot_be_blended():
    with pytest.raises(TypeError, match=r"MixupOrCutMix\(inputs=torch.uint8\): inputs must be"):
        MixupOrCutMix().mix(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
