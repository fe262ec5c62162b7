"""Entry of the command line: settles the threads before torch is imported, then hands over to `visling.cli`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # Waiting OpenMP threads that spin make a second busy process crawl; torch reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # With several processes PyTorch warns, in every run, that no parameter was without a gradient; in other steps some
    # are.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from visling.cli.app import run

    run()


if __name__ == "__main__":
    main()
