# SPDX-License-Identifier: Apache-2.0
"""How often a trigger may cause a look. Pure: the clock is passed in."""

from __future__ import annotations

from typing import Optional

MAX_REASONS = 5


class Pace:
    """Turns a flood of triggers into few looks: the first soon, the rest together, none lost.

    A quiet time earns one look at once, so that a lone trigger costs only `delay` (in which what comes
    together is put together); after that a look follows `min_gap` after the one before. Seconds.
    """

    def __init__(self, min_gap: float = 1.0, delay: float = 0.03, burst: int = 2) -> None:
        self._gap = min_gap
        self._delay = delay
        self._burst = burst
        self._tokens = float(burst)
        self._counted_at = float("-inf")
        self._asked_at: Optional[float] = None
        self._reasons: dict[str, int] = {}
        self._more = 0

    def fire(self, reason: str, now: float) -> None:
        """A trigger came."""
        if self._asked_at is None:
            self._asked_at = now
        if reason in self._reasons or len(self._reasons) < MAX_REASONS:
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
        else:
            self._more += 1

    def due(self, now: float) -> Optional[float]:
        """Seconds until the look that was asked for; None if none was, 0 if it is time."""
        if self._asked_at is None:
            return None
        self._refill(now)
        missing = max(0.0, 1.0 - self._tokens) * self._gap
        return max(0.0, self._asked_at + self._delay - now, missing)

    def take(self, now: float) -> str:
        """A look begins now: why, in a sentence; "" if nothing asked for it (the timer)."""
        self._refill(now)
        self._tokens = max(0.0, self._tokens - 1.0)
        why = [r if n == 1 else f"{r} ({n} times)" for r, n in self._reasons.items()]
        if self._more:
            why.append(f"{self._more} more")
        self._asked_at, self._reasons, self._more = None, {}, 0
        return "; ".join(why)

    def _refill(self, now: float) -> None:
        if self._counted_at > float("-inf"):
            self._tokens = min(self._burst, self._tokens + max(0.0, now - self._counted_at) / self._gap)
        self._counted_at = now
