"""Entry point of the command line: sets variables that torch reads on import, then runs `visling.cli`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # Idle OpenMP threads that spin slow every other process down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # With several processes PyTorch warns, after the first step, that every parameter had a gradient; in later steps
    # some have none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from visling.cli.app import run

    run()


if __name__ == "__main__":
    main()
