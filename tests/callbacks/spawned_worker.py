# SPDX-License-Identifier: Apache-2.0
"""What a spawned process finds in the callbacks that it was given."""


def classes_of(callbacks, queue):
    """Puts their names."""
    queue.put([type(callback).__name__ for callback in callbacks])
