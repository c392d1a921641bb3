"""What all tests share."""

from collections.abc import Iterator

import pytest

from eff import exporting, measure


@pytest.fixture(scope="session", autouse=True)
def few_calls_for_a_latency() -> Iterator[None]:
    """Let runs measure latencies with the fewest calls: half of a small run's time goes there, and no test asserts a time."""
    with pytest.MonkeyPatch.context() as patch:
        original = measure.time_calls
        patch.setattr(measure, "time_calls", lambda call, device, budget_s: original(call, device, 0.0))
        patch.setattr(exporting, "LATENCY_SECONDS", 0.0)
        yield
