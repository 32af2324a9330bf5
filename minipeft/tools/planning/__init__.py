"""A plan of the memory that training takes, from a configuration alone."""
