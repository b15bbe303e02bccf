"""Training programs that are nobody's here: written as public examples are, each with places where it can be broken."""
