"""What is done to models, each from its locks to its end."""
