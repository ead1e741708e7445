"""What users ask for, as the loop sees it: a prompt to open, passes to run, and answers to take from their rows."""
