"""MinGRU."""
