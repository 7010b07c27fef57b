"""The error that the federated layer raises for what a user can put right."""


class FedrotError(ValueError):
    """Bad input; the message names the argument, the client or file, and the value found."""


class Diverged(FedrotError):
    """Local training ran into values that are not finite."""
