"""Servers that somebody else started (`url:`)."""
