"""What is said of each query: class scores and boxes."""
