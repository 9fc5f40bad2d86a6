"""What outlives every process: records, locks, history."""
