"""What several test modules share: named cases, the float64 oracle, the table of refusals, hand-made plan records."""
