"""The screens, and the questions over them."""
