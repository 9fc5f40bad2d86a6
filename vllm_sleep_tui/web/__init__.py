"""The panel in a browser on this machine: a page, and for each tab that opens it a panel of its own."""
