"""One file a task. Importing this package loads none of them."""
