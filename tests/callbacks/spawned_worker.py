# SPDX-License-Identifier: Apache-2.0
"""Returns what a spawned process finds in its callbacks."""


def classes_of(callbacks, queue):
    """Puts their names into the queue."""
    queue.put([type(callback).__name__ for callback in callbacks])
