"""One stage: the loop, the optimizer, the schedule, metrics, monitors."""
