"""What is looked after while a panel or `serve` is open."""
