"""The config file: its types, its reading, its checks."""
