"""Claims of the five papers, by the name that `visling reproduce` takes."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.claim_configs import Claim
from visling.recipes.single_stream_claims import SINGLE_STREAM
from visling.recipes.two_stream_claims import TWO_STREAMS

CLAIMS: Mapping[str, Claim] = {**SINGLE_STREAM, **TWO_STREAMS}
