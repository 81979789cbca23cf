"""What a run is shown as: the terminal, JSON, JUnit XML, one HTML page."""
