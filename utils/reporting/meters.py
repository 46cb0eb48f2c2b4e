"""Means of the loss terms over an epoch."""

from __future__ import annotations


class Meters:
    """Sums of named values over the iterations of an epoch, kept as plain numbers so that a resume continues them exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def update(self, values: dict[str, float]) -> None:
        """Add one iteration."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """Mean of every value over the iterations so far."""
        return {name: total / max(1, self.count) for name, total in self.sums.items()}
