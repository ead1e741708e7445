"""What people call: the command line."""
