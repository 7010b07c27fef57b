"""The error that the federated layer raises for what a user can put right."""


class FedrotError(ValueError):
    """Bad input; the message names the argument, the client or file, and the value found."""


def first_line(error: Exception) -> str:
    """Of its message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Diverged(FedrotError):
    """Local training ran into values that are not finite."""


class Refused(FedrotError):
    """A folder that must not be touched: why, and what the caller's user can do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason, advice)  # as given, so that it passes between processes
        self.reason = reason

    def __str__(self) -> str:
        return "; ".join(self.args)
