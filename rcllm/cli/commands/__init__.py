"""What each command is asked: its options, its words for --help, and where the function is that does the work."""
