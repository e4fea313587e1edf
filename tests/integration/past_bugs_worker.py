# SPDX-License-Identifier: Apache-2.0
"""Two processes, resumed with their own random numbers, and with those of the first.

Usage: python past_bugs_worker.py FOLDER. Saves what then differs from the run that was not stopped.
"""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import whole_run
from forked import values

from lightning_optkit.callbacks import ExactResume


class SaveAt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 3):
            trainer.save_checkpoint(self.path)


def first_in_all(self):
    state = real(self)
    return {**state, "ranks": state["ranks"][:1] * len(state["ranks"])} if state["ranks"][0] else state


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, real, result = Path(sys.argv[1]), ExactResume.state_dict, {}
    for name in ("without", "with"):
        path = folder / f"{name}.ckpt"
        whole = values(partial(whole_run.run, "ddp", 2, 1, SaveAt(path)), 2)
        resumed = values(partial(whole_run.run, "ddp", 2, 2, ckpt_path=path), 2)
        result[name] = [whole_run.differing(*each) for each in zip(whole, resumed, strict=True)]
        ExactResume.state_dict = first_in_all
    torch.save(result, folder / "result.pt")
