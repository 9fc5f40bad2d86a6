"""How figures become cells."""
