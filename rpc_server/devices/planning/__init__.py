"""What making a plan is on every device."""
