"""What recurrence adds to generate()."""
