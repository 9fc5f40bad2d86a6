"""What the panel knows beside the fleet."""
