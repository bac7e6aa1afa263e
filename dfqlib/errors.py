"""Errors for bad input: one line that names the argument, the value and the remedy."""


class InputError(ValueError):
    """An argument cannot be used; the command line prints the message and exits with code 2."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the message without the traceback."""
        return [f"{type(self).__name__}: {self}"]


class NonFiniteError(InputError):
    """A weight, a statistic or a loss became NaN or infinite; the message names the layer or the iteration."""
