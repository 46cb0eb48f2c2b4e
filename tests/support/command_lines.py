"""Command lines that several tests read."""

import shlex

import pytest

import argparser
from utils.errors import UserError

SHAPES = "--dataset shapes --task 6-2"

#: The official LSKD command, as the shell hands it over, without launcher and `run.py`.
LSKD_COMMAND = shlex.split(
    "--data_root DATA --batch_size 6 --dataset voc --name PLOP --task 10-1 --overlap --step 1 --lr 0.001 --epochs 20 "
    "--method FT --pod local --pod_factor 0.01 --pod_logits --pseudo entropy --threshold 0.001 "
    "--classif_adaptive_factor --init_balanced "
    r'--pod_options "{\"switch\": {\"after\": {\"extra_channels\": \"sum\", \"factor\": 0.0005, '
    r'\"type\": \"local\"}}}" '
    "--dis cos --sigmoid whc --aaaaaa 0.005 --unkd --loss_kd 10. --mmm 20 --adaptivealpha 10. --adaptivebeta 0.0001 "
    "--adaptivegamma 0.0005 --opt_level O1"
)


def parse(text):
    return argparser.parse(shlex.split(text))


def refusal(text):
    """The message of the refusal of a command line on the embedded data set."""
    with pytest.raises(UserError) as caught:
        argparser.check(parse(f"{SHAPES} {text}"))
    return str(caught.value)
