# SPDX-License-Identifier: Apache-2.0
"""The mean prediction of several trained networks, and their disagreement.

Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
arXiv:1612.01474, section 2.4 (the mean of the probabilities); mutual information as in Depeweg et al. 2018,
"Decomposition of Uncertainty in Bayesian Deep Learning", arXiv:1710.07283, section 3.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks import NO_LIST, check_callable, check_module, check_one_of, check_tensor, iterate, shown
from lightning_optkit.averaging.average_checkpoints import Checkpoint, check_checkpoints, read_weights

__all__ = ["EnsemblePrediction", "ensemble_predict"]


@dataclass(frozen=True)
class EnsemblePrediction:
    """The prediction of an ensemble for N examples, on CPU: the result of `ensemble_predict`.

    Args:
        mean: Mean over the members of their probabilities or outputs (N, ...).
        std: Standard deviation over the members (divided by their number, so 0 for one member) (N, ...).
        entropy: Entropy of the mean, in nats: the total uncertainty. For softmax (N, ...) without the class dimension,
            for sigmoid per output; None without probabilities.
        mutual_information: `entropy` minus the mean entropy of the members: the uncertainty due to disagreement, which
            more data would reduce.
    """

    mean: Tensor
    std: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


@torch.no_grad()
def ensemble_predict(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    batches: Iterable[Any],
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax",
    predict: Callable[[nn.Module, Any], Tensor] | None = None,
) -> EnsemblePrediction:
    """Mean prediction of one network with the weights of several checkpoints, in evaluation mode.

    The model's weights and modes are restored afterwards.

    Args:
        model: The network; the weights of each checkpoint are loaded into it in turn.
        checkpoints: See `average_checkpoints`, e.g. those of `SnapshotEnsemble`; at least one.
        batches: Iterated once per checkpoint, so an iterator does not work; e.g. a DataLoader without shuffling.
        activation: Turns the network's outputs into probabilities: "softmax" over dimension 1, "sigmoid", or "identity"
            for regression.
        predict: `predict(model, batch)` returns the network's outputs (B, ...). None: `model(batch)`; if the batch is a
            tuple or list, `model` gets its first item. Inputs are moved to the model's device.

    Raises:
        ValueError: if there are no checkpoints or no batches, or if one does not fit the model.

    Example:
        >>> members = [{"weight": torch.tensor([[1.0], [0.0]])}, {"weight": torch.tensor([[0.0], [1.0]])}]
        >>> predicted = ensemble_predict(nn.Linear(1, 2, bias=False), members, [torch.tensor([[100.0]])])
        >>> predicted.mean, predicted.mutual_information  # each member is certain, and they disagree: log(2)
        (tensor([[0.5000, 0.5000]]), tensor([0.6931]))
    """
    check_one_of("ensemble_predict", "activation", activation, ("softmax", "sigmoid", "identity"))
    check_module("ensemble_predict", "model", model)
    checkpoints = check_checkpoints("ensemble_predict", checkpoints)
    if predict is not None:
        check_callable("ensemble_predict", "predict", predict, "predict(model, batch)")
    if not hasattr(type(batches), "__iter__") or isinstance(batches, (*NO_LIST, Tensor, Mapping)):
        raise TypeError(f"ensemble_predict(batches={shown(batches)}): batches must be a list or a DataLoader.")
    if isinstance(batches, Iterator):
        raise ValueError("ensemble_predict(batches=<iterator>): batches must be iterable once per checkpoint.")
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    mean = squares = own_entropy = torch.zeros(())
    try:
        model.eval()
        for count, checkpoint in enumerate(checkpoints, start=1):
            try:
                model.load_state_dict(read_weights("ensemble_predict", "checkpoints", checkpoint))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"ensemble_predict(checkpoints=[...]): number {count} must fit: {reason}") from error
            outputs = _all_outputs(model, batches, predict or _predict)
            values = _activated(outputs, activation)
            difference = values - mean
            mean = mean + difference / count
            squares = squares + difference * (values - mean)
            if activation != "identity":
                own_entropy = own_entropy + (_entropy(values, activation) - own_entropy) / count
    finally:
        model.load_state_dict(own)
        for module, training in modes.items():
            module.training = training
    std = (squares / len(checkpoints)).clamp(min=0).sqrt()
    if activation == "identity":
        return EnsemblePrediction(mean, std, None, None)
    entropy = _entropy(mean, activation)
    return EnsemblePrediction(mean, std, entropy, (entropy - own_entropy).clamp(min=0))


def _predict(model: nn.Module, batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outputs: Tensor = model(check_tensor("ensemble_predict", "batches", inputs, meta=False).to(device))
    return outputs


def _all_outputs(model: nn.Module, batches: Iterable[Any], predict: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    owner, name = "ensemble_predict", "predict(model, batch)"
    reading = iterate(owner, "batches", batches, "a list or a DataLoader")
    outputs = [check_tensor(owner, name, predict(model, batch), "floating", min_ndim=1).cpu() for batch in reading]
    if not outputs:
        raise ValueError("ensemble_predict(batches=[]): batches must hold at least one.")
    joined = torch.cat(outputs)
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _activated(outputs: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return outputs.softmax(dim=1)
    return outputs.sigmoid() if activation == "sigmoid" else outputs


def _entropy(probabilities: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        entropy: Tensor = torch.special.entr(probabilities).sum(dim=1)
        return entropy
    both: Tensor = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return both
