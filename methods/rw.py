"""RW: Riemannian walk. The part is methods/ewc.py's, the measure methods.regularizer.RiemannianRegularizer."""

from __future__ import annotations

from methods.base import Method


class RW(Method):
    """Riemannian walk."""

    name = "RW"
    paper = "Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV"
    year = 2018
    stores = "the importance of each weight"
    step0 = "its own, else there is no penalty"
    preset = {"regularizer": "rw", "reg_importance": 100.0}
