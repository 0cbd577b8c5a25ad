"""TiRex-2."""
