"""The evaluator: turns self-edits into rewards. Dispatches trials, grades answers, subtracts the baseline."""
