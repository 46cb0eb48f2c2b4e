"""PI: path integral (synaptic intelligence). The part is methods/ewc.py's, the measure methods.regularizer.PathRegularizer."""

from __future__ import annotations

from methods.base import Method


class PI(Method):
    """Path integral."""

    name = "PI"
    paper = "Zenke et al., Continual Learning Through Synaptic Intelligence, ICML"
    year = 2017
    stores = "the importance of each weight"
    step0 = "its own, else there is no penalty"
    preset = {"regularizer": "pi", "reg_importance": 100.0}
