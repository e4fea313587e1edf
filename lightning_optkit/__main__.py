# SPDX-License-Identifier: Apache-2.0
"""`python -m lightning_optkit` runs `optkit`."""

from lightning_optkit.cli import main

if __name__ == "__main__":
    main()
