"""The panel: one screen over the fleet, built on Textual."""
