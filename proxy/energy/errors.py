"""What the pure core raises."""


class EventError(ValueError):
    """An event the ledger refuses; the message says why. The ledger's state is unharmed."""
