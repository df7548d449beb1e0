"""One training that holds many models: depths, queries and canvases are chosen after it."""
