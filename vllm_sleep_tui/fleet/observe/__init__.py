"""What is known now, read without changing anything."""
