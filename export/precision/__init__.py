"""Half precision and int8 as passes over the graph."""
