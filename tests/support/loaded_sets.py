"""Data sets whose samples tell of the process that loads them, or trouble it; processes import them from here."""

import os
import signal
import sys
import threading
import time

import torch
from torch.utils.data import Dataset

LOCK = threading.Lock()


class Four(Dataset):
    """Four samples."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(index)


class Endless(Four):
    """More samples than anybody loads."""

    def __len__(self):
        return 10**6


class Processes(Four):
    """A sample is the process that loads it, and its parent."""

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), os.getppid()])


class Imported(Four):
    """A sample is whether the process found these modules imported when it began."""

    def __init__(self, names):
        self.names = names

    def __getitem__(self, index):
        return torch.tensor([name in sys.modules for name in self.names])


class Remote(Four):
    """Samples of a store that closes the connection."""

    def __getitem__(self, index):
        raise ConnectionResetError("the store of images closed")


class Locked(Four):
    """Each sample needs a lock."""

    def __getitem__(self, index):
        with LOCK:
            return torch.tensor(index)


class Slow(Four):
    """A sample takes so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.tensor(index)


class Stuck(Four):
    """Its second sample never comes, and the process that is asked for it hears nothing."""

    def __getitem__(self, index):
        if index == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(1000)
        return torch.zeros(1)


class Killed(Four):
    """The process that is asked for its second sample ends at once, as one does for which the memory is full."""

    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)
