"""`UserError`, which distinguishes mistakes of the user from bugs."""


class UserError(ValueError):
    """A mistake of the user: the program prints its message as one line and ends with exit code 2.

    The message names the value, its place and the remedy. Every other `ValueError` is a bug and keeps its traceback.
    """
