"""Entry of the command line: settles the threads before torch is imported, then hands over to `visling.cli`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # Waiting OpenMP threads that spin make a second busy process crawl; torch reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from visling.cli import run

    run()


if __name__ == "__main__":
    main()
