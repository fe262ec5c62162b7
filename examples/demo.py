"""From drawn pictures to answered questions: `visling demo`, from a clone. The stages stand in visling/runs/demo.py."""

from __future__ import annotations

import sys

from visling.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "demo")
    main()
