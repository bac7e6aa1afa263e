"""The errors that bad input raises: one line that names the argument, the value and the remedy."""


class InputError(ValueError):
    """Something passed in cannot be used; the command line prints the message and exits with code 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows below the cell: the message, without the way through the library (IPython's hook)."""
        return [f"{type(self).__name__}: {self}"]


class NonFiniteError(InputError):
    """A weight, a statistic or a loss became NaN or infinite; the message names the layer or the step."""
