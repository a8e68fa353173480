"""What every service shares: the contract, the words, the wiring. Imports no service and no torch."""

__version__ = "0.1.0"
