# SPDX-License-Identifier: Apache-2.0
"""Update rules, one per file, with torch.optim's arguments where torch has the rule."""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.optimizers.adabelief import AdaBelief
from lightning_optkit.optimizers.adadelta import Adadelta
from lightning_optkit.optimizers.adafactor import Adafactor
from lightning_optkit.optimizers.adagrad import Adagrad
from lightning_optkit.optimizers.adam import Adam
from lightning_optkit.optimizers.adamax import Adamax
from lightning_optkit.optimizers.adamw import AdamW
from lightning_optkit.optimizers.adan import Adan
from lightning_optkit.optimizers.ademamix import AdEMAMix
from lightning_optkit.optimizers.adopt import ADOPT
from lightning_optkit.optimizers.came import CAME
from lightning_optkit.optimizers.compressed import compressed_state_dict, widened_state_dict
from lightning_optkit.optimizers.convert import from_torch_, full_precision_state_dict, to_torch_
from lightning_optkit.optimizers.dadapt_adam import DAdaptAdam
from lightning_optkit.optimizers.groups import GroupTable, parameter_groups
from lightning_optkit.optimizers.lamb import LAMB
from lightning_optkit.optimizers.lars import LARS
from lightning_optkit.optimizers.lion import Lion
from lightning_optkit.optimizers.mars import MARS
from lightning_optkit.optimizers.muon import Muon
from lightning_optkit.optimizers.nadam import NAdam
from lightning_optkit.optimizers.prodigy import Prodigy
from lightning_optkit.optimizers.radam import RAdam
from lightning_optkit.optimizers.rmsprop import RMSprop
from lightning_optkit.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from lightning_optkit.optimizers.schedule_free_sgd import ScheduleFreeSGD
from lightning_optkit.optimizers.sgd import SGD
from lightning_optkit.optimizers.signum import Signum
from lightning_optkit.optimizers.soap import SOAP
from lightning_optkit.optimizers.sophia_g import SophiaG
from lightning_optkit.optimizers.stable_adamw import StableAdamW

__all__ = [
    "ADOPT",
    "CAME",
    "LAMB",
    "LARS",
    "MARS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "DAdaptAdam",
    "GroupTable",
    "Lion",
    "Muon",
    "NAdam",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Signum",
    "SophiaG",
    "StableAdamW",
    "compressed_state_dict",
    "from_torch_",
    "full_precision_state_dict",
    "parameter_groups",
    "to_torch_",
    "widened_state_dict",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
