"""What reuse saves and costs on the device at hand, measured before anything is drawn."""
