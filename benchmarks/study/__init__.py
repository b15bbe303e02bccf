"""Why those networks collapse: runs, their measures, and what they say together (README.md)."""
