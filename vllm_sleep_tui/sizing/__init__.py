"""What models need, and who fits beside whom: arithmetic over files and measurements."""
