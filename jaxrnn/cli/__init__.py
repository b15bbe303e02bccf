"""The commands: each a file that is run by itself, and what they share."""
