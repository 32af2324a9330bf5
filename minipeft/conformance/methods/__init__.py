"""The methods that the kit knows, in the order in which they are reported."""
