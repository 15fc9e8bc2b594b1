"""What a command prints at its end: the artifact and its counts, or the table of a report and where its page lies."""
